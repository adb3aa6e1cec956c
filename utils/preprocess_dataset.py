"""Text → windows: tokenizes a dataset and cuts it into windows of `block_size` tokens, `stride` apart.

    python utils/preprocess_dataset.py --dataset_name Salesforce/wikitext --dataset_config_name wikitext-103-raw-v1 …

Writes a `datasets.DatasetDict` folder with the columns input_ids, labels, attention_mask and dstore_range,
`dstore_summary.json`, `preprocess.json` (what made it) and, where splits were made by document, the text
itself in `raw/<split>.jsonl`. As the original does, it leaves out what does not fill a window at the end of each 1,000
rows of text, and says how many tokens that is; with --group_rows or --by_document nothing is left out. Where text comes from is
`utils/text_files.py`, how it is cut `utils/windows.py`.
"""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli import command, flag, parse, required
from utils.errors import InputError, check_fraction
from utils.files import TEMPORARY_PREFIX, ensure_folder, read_json, write_json
from utils.legacy import FolderLock, atomic_folder, require_same, sha256_file
from utils.loading import WINDOWS_RECORD as RECORD

FORMAT_VERSION = 1
# Flags that decide the windows, and those settings that windows of one folder must share.
DECISIVE = (
    *("dataset_config_name", "text_column", "document_separator", "validation_fraction", "test_fraction", "seed"),
    *("min_document_characters", "max_document_characters", "max_documents", "block_size", "stride", "padding_index"),
    *("group_rows", "by_document"),
)
CUT = ("tokenizer_sha256", "block_size", "stride", "padding_index", "group_rows", "by_document", "window_bos")
# What settings were that older records lack.
BEFORE = {"group_rows": False, "by_document": False, "window_bos": None}


@dataclass
class Arguments:
    """Flags of this command."""

    dataset_name: str = required(
        "a dataset on the hub; a folder that datasets saved or can load; a folder of files named by their split "
        "(train.txt, validation.jsonl.gz, test.parquet); a folder of .txt files; or one .txt, .jsonl, .csv or .parquet file "
        "(compressed, too: .gz, .bz2, .xz)"
    )
    tokenizer_path: str = required("folder or hub name of the tokenizer (a model's folder will do)")
    output_dir: str = required("folder of windows to write")
    dataset_config_name: str | None = flag(None, "the dataset's configuration, or its subfolder of that name")
    text_column: str = flag("text", "column that holds the text")
    document_separator: str | None = flag(
        None,
        "regular expression whose matches separate the documents of a .txt file; the matched text is dropped "
        "(a look-ahead such as (?m)^(?=# ) keeps it), and so are documents of white space only",
    )
    validation_fraction: float = flag(0.0, "share of the train split's documents to make a validation split of")
    test_fraction: float = flag(0.0, "share of the train split's documents to make a test split of")
    seed: int = flag(42, "which documents go to which split")
    min_document_characters: int = flag(0, "leave out documents of fewer characters")
    max_document_characters: int | None = flag(
        None, "leave out the rows of a document that begin after so many characters of it"
    )
    max_documents: int | None = flag(None, "take only the first so many documents of each split of the source")
    block_size: int = flag(1024, "tokens of a window")
    stride: int = flag(512, "tokens from one window to the next; those before them are context without labels")
    group_rows: bool = flag(
        False,
        "leave no token out: windows go on from row to row, the last is padded (of each 50,000 rows); without it, what "
        "does not fill a window at the end of each 1,000 rows is left out, as in the original",
    )
    by_document: bool = flag(
        False,
        "every document begins a window of its own, its last window is padded: a memory then learns a document as it "
        "stands alone, with no other one before it",
    )
    window_bos: bool = flag(
        False,
        "begin each window with the tokenizer's BOS token, without a label, and put no special tokens at the rows; "
        "without it, each row of text has those that the tokenizer adds, with labels, as in the original",
    )
    padding_index: int = flag(-100, "label of positions that predict nothing; later stages skip -100")
    num_proc: int = flag(1, "processes; the windows are the same for any number")
    trust_remote_code: bool = flag(False, "run tokenizer code that comes with --tokenizer_path")
    append_to: str | None = flag(
        None, "windows folder that the new ones follow: --output_dir gets its windows, then those of this text"
    )
    overwrite: bool = flag(False, "make windows that are there already again, or others in their place")


def tokenize_and_group_text(
    raw_datasets: Mapping[str, Any],
    tokenizer: Any,
    block_size: int = 1024,
    stride: int = 512,
    padding_index: int = -100,
    num_process: int = 1,
) -> Any:
    """Windows of every split, in memory, as the original makes them (`utils.windows.windows_of_split`): a DatasetDict.

    The text of {split: Dataset} is in the column `text`, or in the first column without one; the sizes are the flags'.
    Raises InputError for sizes that make no windows, and where there is no token to pad with.
    """
    import datasets

    from utils.windows import WindowSizes, windows_of_split

    sizes = WindowSizes(block_size, stride, padding_index)
    windows = {}
    for split, rows in raw_datasets.items():
        if "text" not in rows.column_names:
            rows = rows.rename_column(rows.column_names[0], "text")
        with tempfile.TemporaryDirectory() as work:
            windows[split], *_ = windows_of_split(rows, tokenizer, sizes, num_process, Path(work), in_memory=True)
    return datasets.DatasetDict(windows)


def check_arguments(arguments: Arguments) -> None:
    """Check the flags by themselves. Raises InputError."""
    for name in ("validation_fraction", "test_fraction"):
        check_fraction(f"--{name}", getattr(arguments, name))
    if arguments.validation_fraction + arguments.test_fraction >= 1:
        raise InputError("--validation_fraction and --test_fraction: expected a sum below 1, to leave text to train on")
    for name in ("num_proc", "max_documents", "max_document_characters"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: expected 1 or more")


def text_digest(path: Path) -> str | None:
    """SHA-256 over the names and bytes of the files at `path`, hidden ones left out; None if nothing is there."""
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of what decides a tokenizer's ids, and of its padding and end-of-sequence tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{state}\0{tokenizer.pad_token_id}\0{tokenizer.eos_token_id}".encode()).hexdigest()


def settings_of(arguments: Arguments, tokenizer: Any) -> dict[str, Any]:
    """What decides the windows: equal settings, equal windows. Local text counts by content, not by path."""
    source = Path(arguments.dataset_name).expanduser()
    return {
        "format_version": FORMAT_VERSION,
        "dataset_name": None if source.exists() else arguments.dataset_name,
        "text_sha256": text_digest(source),
        "tokenizer_length": len(tokenizer),
        "tokenizer_sha256": tokenizer_digest(tokenizer),
        "append_to_sha256": text_digest(Path(arguments.append_to)) if arguments.append_to else None,
        **{name: getattr(arguments, name) for name in DECISIVE},
        "window_bos": tokenizer.bos_token_id if arguments.window_bos else None,
    }


def is_done(output: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether the output is there already, made by the same settings.

    Raises:
        InputError: the folder cannot be written, holds something else, or windows of other settings.
    """
    ensure_folder(output.parent)
    if not output.exists() or not any(ensure_folder(output).iterdir()):
        return False
    if not (output / RECORD).exists() and not (overwrite and (output / "dataset_dict.json").exists()):
        raise InputError(
            f"--output_dir {output}: is not empty and holds no windows of this command; choose another folder"
        )
    if overwrite:
        return False
    before = BEFORE | read_json(output / RECORD)["settings"]
    require_same(f"--output_dir {output}", before, settings, "add --overwrite, or choose another folder")
    return True


def divide(splits: dict[str, Any], arguments: Arguments, work: Path) -> dict[str, Any]:
    """Make the asked-for splits out of the documents of `train`. Raises InputError."""
    from utils.text_files import split_documents

    name = arguments.dataset_name
    fractions = {"validation": arguments.validation_fraction, "test": arguments.test_fraction}
    for split, fraction in fractions.items():
        if fraction > 0 and split in splits:
            raise InputError(f"--{split}_fraction: {name} has a {split} split already; leave the flag out")
    if "train" not in splits:
        raise InputError(f"--dataset_name {name}: has no train split to divide, but {', '.join(splits)}")
    divided = split_documents(splits.pop("train"), fractions, seed=arguments.seed, work=work)
    return {**divided, **splits}


def open_earlier(folder: str, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(windows by split, record) of `--append_to`. Raises InputError unless they were cut as `settings` say."""
    import datasets

    from utils.loading import load_windows

    path = Path(folder)
    if not (path / RECORD).is_file():
        raise InputError(f"--append_to {folder}: holds no windows with a {RECORD}; make them with this command")
    record = read_json(path / RECORD)
    before, now = ({name: each[name] for name in CUT} for each in (BEFORE | record["settings"], settings))
    require_same(f"--append_to {folder}", before, now, "windows of one folder are cut alike")
    names = datasets.load_from_disk(folder).keys()
    return {name: load_windows(folder, name).with_format(None) for name in names}, record


def make_windows(
    arguments: Arguments, sizes: Any, tokenizer: Any, settings: dict[str, Any], output: Path, work: Path
) -> None:
    """Read, divide, cut and write everything; the folder `output` appears when all of it is there."""
    import datasets

    from utils.cli import say
    from utils.loading import vocabulary_digest
    from utils.text_files import document_numbers, filter_documents, open_source
    from utils.windows import windows_of_split

    splits = open_source(
        arguments.dataset_name,
        config_name=arguments.dataset_config_name,
        text_column=arguments.text_column,
        document_separator=arguments.document_separator,
        work=work,
    )
    for split, rows in splits.items():
        splits[split] = filter_documents(
            rows,
            work / f"chosen-{split}.arrow",
            min_characters=arguments.min_document_characters,
            max_documents=arguments.max_documents,
            max_characters=arguments.max_document_characters,
        )
    keeps_text = arguments.validation_fraction > 0 or arguments.test_fraction > 0
    if keeps_text:
        splits = divide(splits, arguments, work)
    windows, counts, added = {}, {}, {}
    if arguments.append_to:
        windows, record = open_earlier(arguments.append_to, settings)
        counts, keeps_text = record["splits"], keeps_text or record["divided"]
    for split, rows in splits.items():
        parts, before = ensure_folder(work / f"windows-{split}"), windows.get(split)
        first_row = before[-1]["dstore_range"][1] if before else 0
        made, tokens, in_text = windows_of_split(rows, tokenizer, sizes, arguments.num_proc, parts, first_row=first_row)
        if tokens < sizes.width:
            raise InputError(
                f"--dataset_name {arguments.dataset_name}: split {split} has {tokens} tokens, less than one window "
                f"of {arguments.block_size}; give more text, or a smaller --block_size and --stride"
            )
        if before:
            made = datasets.concatenate_datasets([before, made.cast(before.features)])
        windows[split], earlier = made, counts.get(split, {})
        amounts = {"documents": int(document_numbers(rows)[-1]) + 1, "rows": len(rows)}
        amounts |= {"tokens_of_text": in_text, "tokens_left_out": in_text - tokens, "tokens": tokens}
        added[split] = amounts
        counted = amounts.keys() & earlier.keys() if earlier else amounts.keys()  # older records count less
        counts[split] = {name: earlier.get(name, 0) + amount for name, amount in amounts.items() if name in counted}
        counts[split] |= {"windows": len(made), "dstore_size": made[-1]["dstore_range"][1]}
    record = {
        "settings": settings,
        "dataset_name": arguments.dataset_name,
        "tokenizer": arguments.tokenizer_path,
        "vocabulary_sha256": vocabulary_digest(tokenizer),
        "divided": keeps_text,  # then the text is kept in raw/
        "splits": counts,
    }
    raw_before = Path(arguments.append_to) / "raw" if arguments.append_to else None
    write_output(output, windows, record, splits, raw_before)
    for split, count in counts.items():
        if arguments.append_to and split in added:
            say(f"{split}, added: {in_words(added[split])}")
        say(f"{split}: {in_words(count)}, {count['dstore_size']:,} datastore rows")


def in_words(amounts: dict[str, int]) -> str:
    """Counts of a split with their names."""
    return ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in amounts.items() if name != "dstore_size")


def write_output(
    output: Path, windows: dict[str, Any], record: dict[str, Any], texts: dict[str, Any], raw_before: Path | None
) -> None:
    """Write windows, summary and record as one folder that appears whole.

    Where the record says that splits were divided, the documents go to raw/<split>.jsonl, {"text": …} on each line:
    those in the folder `raw_before`, then those of `texts`.
    """
    import datasets
    import transformers

    from utils.text_files import iterate_documents

    versions = {"datasets": datasets.__version__, "transformers": transformers.__version__}
    summary = {
        split: {"dstore_size": count["dstore_size"], "dataset_cnt_len": count["windows"]}
        for split, count in record["splits"].items()
    }
    with atomic_folder(output) as folder:
        datasets.DatasetDict(windows).save_to_disk(str(folder))
        for split in windows if record["divided"] else ():
            path = ensure_folder(folder / "raw") / f"{split}.jsonl"
            if raw_before is not None and (raw_before / path.name).is_file():
                shutil.copyfile(raw_before / path.name, path)
            with open(path, "a", encoding="utf-8") as file:
                for text in iterate_documents(texts[split]) if split in texts else ():
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        write_json(folder / "dstore_summary.json", summary)
        write_json(folder / RECORD, {**record, "versions": versions})


@command
def main() -> None:
    (arguments,) = parse(Arguments, description="Tokenize text and cut it into windows.")
    check_arguments(arguments)

    from utils.cli import say
    from utils.loading import load_tokenizer, quiet_libraries
    from utils.windows import WindowSizes

    sizes = WindowSizes(
        arguments.block_size, arguments.stride, arguments.padding_index, arguments.group_rows, arguments.by_document
    )
    quiet_libraries()
    tokenizer = load_tokenizer(arguments.tokenizer_path, required=True, trust_remote_code=arguments.trust_remote_code)
    if arguments.window_bos:
        if tokenizer.bos_token_id is None:
            raise InputError(f"--window_bos: the tokenizer {arguments.tokenizer_path} has no BOS token; leave it out")
        sizes = replace(sizes, bos=tokenizer.bos_token_id)
    output = Path(arguments.output_dir).expanduser()
    settings = settings_of(arguments, tokenizer)
    if is_done(output, settings, arguments.overwrite):
        say(f"{output}: these windows are there already; --overwrite makes them again")
        return
    if arguments.padding_index != -100:
        say(f"--padding_index {arguments.padding_index}: the other stages skip labels of -100 only")
    # One work folder for each output: its lock keeps a second run out; the next run clears what a killed one left.
    work = output.parent / f"{TEMPORARY_PREFIX}work-{output.name}"
    with FolderLock(ensure_folder(work)):
        abandoned = output.parent.glob(f"{TEMPORARY_PREFIX}[0-9]*-{glob.escape(output.name)}")
        for left in [*work.glob("[!.]*"), *abandoned]:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            make_windows(arguments, sizes, tokenizer, settings, output, work)
        finally:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
