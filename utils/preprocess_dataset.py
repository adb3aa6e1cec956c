"""Text → windows: tokenizes a dataset and cuts it into windows of `block_size` tokens, `stride` apart.

    python utils/preprocess_dataset.py --dataset_name Salesforce/wikitext --dataset_config_name wikitext-103-raw-v1 …

Writes a `datasets.DatasetDict` folder with the columns input_ids, labels, attention_mask and dstore_range,
`dstore_summary.json` with the counts of each split, and `made.json`. With --by_document or a fraction, the text of each
split is written too, to `raw/<split>.jsonl`. `utils/text_files.py` reads text, `utils/windows.py` cuts it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.artefact import BEGUN, Made, begin, record_path
from utils.cli import command, flag, parse, required, say
from utils.errors import InputError
from utils.files import ensure_folder, naming_full_disk, remove, sync, write_json
from utils.text_files import open_source, select_documents, split_documents
from utils.windows import WindowSizes, padding_token, windows_of_split

SIZES = ("block_size", "stride", "padding_index", "group_rows", "by_document")
FRACTIONS = ("test_fraction", "validation_fraction")
LIMITS = ("min_document_characters", "max_document_characters", "max_documents")


@dataclass
class Arguments:
    """Flags of this command."""

    dataset_name: str = required(
        "a dataset on the hub, a folder that `datasets` saved or can load, a folder of files named by their split "
        "(train.txt, validation.jsonl.gz, test.parquet), a folder of .txt documents, or one such file (also .csv)"
    )
    tokenizer_path: str = required("folder or hub name of the tokenizer (a model's folder also works)")
    output_dir: str = required("folder of windows to write")
    dataset_config_name: str | None = flag(None, "the dataset's configuration, or its subfolder of that name")
    text_column: str = flag("text", "column that holds the text; each row is a document")
    validation_fraction: float = flag(
        0.0, "fraction of the train split's documents to make a validation split of, if there is none"
    )
    test_fraction: float = flag(
        0.0, "fraction of the train split's documents to make a test split of, if there is none"
    )
    seed: int = flag(42, "decides which documents go to which split")
    min_document_characters: int = flag(0, "leave out documents of fewer characters")
    max_document_characters: int | None = flag(None, "cut documents after this many characters, at the end of the line")
    max_documents: int | None = flag(None, "use only the first documents of each split of the source")
    block_size: int = flag(1024, "tokens of a window")
    stride: int = flag(512, "tokens from one window to the next; the tokens before them are context without labels")
    group_rows: bool = flag(
        False,
        "windows continue from row to row, and the last one of each 50,000 rows is padded: no token is left out; by "
        "default, tokens at the end of each 1,000 rows that do not fill a window are left out, as in the original",
    )
    by_document: bool = flag(
        False, "each document (each .txt file) starts a new window, and its last window is padded; no token is left out"
    )
    window_bos: bool = flag(
        False,
        "begin each window with an unlabelled BOS token, in place of the special tokens that rows have by default",
    )
    padding_index: int = flag(-100, "label of positions that predict nothing; the other commands expect -100")
    num_proc: int = flag(1, "number of processes; the windows do not depend on it")
    trust_remote_code: bool = flag(False, "run code that comes with the tokenizer")
    overwrite: bool = flag(False, "replace windows that are already there")


def tokenize_and_group_text(
    raw_datasets: Mapping[str, Any],
    tokenizer: Any,
    block_size: int = 1024,
    stride: int = 512,
    padding_index: int = -100,
    num_process: int = 1,
) -> Any:
    """A DatasetDict with the windows of every split, in memory, as the original makes them (`windows_of_split`).

    The text of {split: Dataset} is in the column `text`, or else in the first column. Raises InputError.
    """
    import datasets

    sizes = WindowSizes(block_size, stride, padding_index)
    windows = {}
    for split, rows in raw_datasets.items():
        if "text" not in rows.column_names:
            rows = rows.rename_column(rows.column_names[0], "text")
        windows[split], _ = windows_of_split(rows, tokenizer, sizes, num_process)
    return datasets.DatasetDict(windows)


def settings_of(arguments: Arguments, tokenizer: Any) -> dict[str, Any]:
    """What decides the windows. Local text is identified by the names and sizes of its files, not by its path."""
    from utils.loading import vocabulary_digest

    source = Path(arguments.dataset_name).expanduser()
    files = sorted(file for file in source.rglob("*") if file.is_file()) if source.is_dir() else [source]
    sizes = [[file.relative_to(source.parent).as_posix(), file.stat().st_size] for file in files if source.exists()]
    flags = ("dataset_config_name", "text_column", *FRACTIONS, "seed", *LIMITS, *SIZES)
    return {
        "text": sizes or arguments.dataset_name,
        "vocabulary": vocabulary_digest(tokenizer),
        "pad_token": padding_token(tokenizer),
        "window_bos": tokenizer.bos_token_id if arguments.window_bos else None,
        **{name: getattr(arguments, name) for name in flags},
    }


def read_text(arguments: Arguments, work: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The text that the flags ask for: {split: Dataset}, and {split: characters left out}. Raises InputError."""
    name, limits = arguments.dataset_name, [getattr(arguments, limit) for limit in LIMITS]
    fractions = {flag.split("_")[0]: getattr(arguments, flag) for flag in FRACTIONS}
    whole_files = arguments.by_document or any(limits) or any(fractions.values())
    splits = open_source(name, arguments.dataset_config_name, arguments.text_column, whole_files, work)
    left_out = {}
    for split, rows in splits.items() if any(limits) else ():
        splits[split], left_out[split] = select_documents(rows, *limits, work / f"documents-{split}.arrow")
    for split in fractions.keys() & splits.keys():
        fractions[split] = 0.0  # the text has its own
    if any(fractions.values()):
        if "train" not in splits:
            there = f"--dataset_name {name}: has the splits {', '.join(splits)}"
            raise InputError(f"{there}; --validation_fraction and --test_fraction need train")
        splits = split_documents(splits.pop("train"), fractions, arguments.seed) | splits
    return splits, left_out


def make_windows(arguments: Arguments, sizes: WindowSizes, tokenizer: Any, output: Path, work: Path) -> None:
    """Read and cut the text, and write everything but the record into `output`. Raises InputError before it writes."""
    import datasets

    splits, left_out = read_text(arguments, work)
    windows, summary = {}, {}
    for split, rows in splits.items():
        path = work / f"windows-{split}.arrow"
        windows[split], counts = windows_of_split(rows, tokenizer, sizes, arguments.num_proc, path)
        if counts["tokens"] < (2 if sizes.by_document else sizes.width):
            few = f"split {split} has {counts['tokens']} tokens, less than one window"
            raise InputError(
                f"--dataset_name {arguments.dataset_name}: {few}; give more text or a smaller --block_size"
            )
        counts |= {"rows": len(rows), "dataset_cnt_len": len(windows[split])}
        summary[split] = counts | {"characters_left_out": left_out.get(split, 0)}
    for split, rows in splits.items() if arguments.by_document or any(map(vars(arguments).get, FRACTIONS)) else ():
        rows.to_json(ensure_folder(output / "raw") / f"{split}.jsonl", force_ascii=False)
    write_json(output / "dstore_summary.json", summary)
    datasets.DatasetDict(windows).save_to_disk(str(output))
    for split, counts in summary.items():
        say(
            f"{split}: {counts['rows']:,} rows of text ({counts['characters_left_out']:,} characters left out), "
            f"{counts['tokens']:,} tokens ({counts['tokens_left_out']:,} left out), "
            f"{counts['dataset_cnt_len']:,} windows, {counts['dstore_size']:,} datastore rows"
        )


def main() -> None:
    (arguments,) = parse(Arguments, description="Tokenize text and cut it into windows.")
    from utils.loading import load_tokenizer, quiet_libraries

    quiet_libraries()
    tokenizer = load_tokenizer(arguments.tokenizer_path, required=True, trust_remote_code=arguments.trust_remote_code)
    if arguments.window_bos and tokenizer.bos_token_id is None:
        raise InputError(f"--window_bos: the tokenizer {arguments.tokenizer_path} has no BOS token")
    settings = settings_of(arguments, tokenizer)
    sizes = WindowSizes(**{name: settings[name] for name in SIZES}, bos=settings["window_bos"])
    output = Path(arguments.output_dir).expanduser()
    making = begin(output, Made("windows", settings), overwrite=arguments.overwrite)
    if making.done:
        say(f"{output}: these windows are there already; --overwrite makes them again")
        return
    work = output / ".work"
    remove(work)  # of a run that was killed
    try:
        with naming_full_disk(output):
            make_windows(arguments, sizes, tokenizer, output, ensure_folder(work))
    except InputError:  # nothing is written yet: the next run may have other settings
        remove(record_path(output, BEGUN))
        making.close()
        raise
    finally:
        remove(work)
    sync(output)
    making.finish()


if __name__ == "__main__":
    command(main)()
