"""The base model's stage: fine-tune it, score it (alone or as a kNN-LM), save its datastore.

python -m train_base --do_eval ...                      perplexity
python -m train_base --do_eval --save_knnlm_dstore ...  datastore of (hidden state, next token)
python -m train_base --do_eval --knn ...                perplexity of the kNN-LM
python -m train_base --do_train ...                     fine-tuning with the Hugging Face Trainer
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils.cli import command, flag, make_parser, note_unused, parse
from utils.errors import InputError, check_at_least
from utils.results import ADAPTIVE, ScoreArguments
from utils.unused_flags import TRAIN_BASE

DESCRIPTION = "Fine-tune, score or embed with a base language model."


@dataclass(kw_only=True)
class StageArguments(ScoreArguments):
    """Base model, windows, datastore and kNN-LM."""

    temperature_name = "knn_temp"

    from_scratch: bool = flag(False, "initialize random weights from the config")
    eval_subset: list[str] = flag(
        ["validation"], "split to score, to embed (one or several), or to evaluate on during fine-tuning"
    )
    max_train_samples: int | None = flag(None, "train on at most this many windows")
    block_size: int = flag(1024, "accepted for the original's command line, and ignored")
    stride: int = flag(512, "accepted for the original's command line, and ignored")
    patience: int | None = flag(None, "fine-tuning: stop after this many evaluations without improvement")
    knn: bool = flag(False, "score the kNN-LM (needs --val_file and --index_file)")
    knn_gpu: bool = flag(False, "search on the GPU")
    knn_temp: list[float] = flag([1.0], "temperature of the kNN kernel, one or several")
    save_knnlm_dstore: bool = flag(False, "write the datastore of --eval_subset into --dstore_dir")
    save_logprob: bool = flag(
        False,
        "with --save_knnlm_dstore: also store the base's log-probability of each value; of several splits not train's",
    )
    dstore_dir: str = flag("dstore", "folder of the datastore")
    overwrite: bool = flag(False, "replace a datastore or a fine-tuned model that was made with other settings")
    val_file: str | None = flag(None, "values of the indexed rows: a datastore, .npy, or the original's .pkl name")
    index_file: str | None = flag(None, "FAISS index")
    k: int = flag(1024, "neighbours")
    probe: int = flag(32, "inverted lists to search (FAISS's nprobe)")


def main() -> None:
    if "--help" in sys.argv or "-h" in sys.argv:
        # TrainingArguments would import torch; transformers documents its flags.
        parser = make_parser((StageArguments,), DESCRIPTION)
        parser.epilog = "Every flag of transformers.TrainingArguments is accepted too (--do_eval, --output_dir, …)."
        parser.parse_args(["--help"])
    import torch
    from transformers import set_seed

    from training.finetune import FinetuneArguments, finetune
    from utils.loading import check_windows, load_windows, quiet_libraries
    from utils.memories import captured_by

    arguments, training = parse(StageArguments, FinetuneArguments, description=DESCRIPTION, unused=TRAIN_BASE)
    check_arguments(arguments, training)
    quiet_libraries()
    windows, subsets = None, arguments.eval_subset
    arguments = replace(arguments, eval_subset=subsets[0])
    if training.do_eval or arguments.knn or arguments.save_knnlm_dstore or arguments.dstore_path:
        windows, *others = [load_windows(arguments.dataset_name, each, arguments.max_eval_samples) for each in subsets]
    if arguments.dstore_path:
        evaluate(None, windows, arguments, training)
        return
    dtype = torch.float32 if training.do_train else arguments.dtype(bf16=training.bf16, fp16=training.fp16)
    tokenizer = arguments.open_tokenizer()
    set_seed(training.seed)  # of the random weights of --from_scratch
    base = arguments.open_base(tokenizer, dtype=dtype, from_scratch=arguments.from_scratch)
    if windows is not None:
        captured_by(arguments, base)
        for split in (windows, *others):
            check_windows(arguments.dataset_name, split, base.config, tokenizer)
    if training.do_train:
        result = finetune(base, tokenizer, arguments, training, overwrite=arguments.overwrite)
        if windows is None:
            return
        arguments = replace(arguments, model_name_or_path=str(result))
        base = arguments.open_base(tokenizer, dtype=dtype)
    if arguments.save_knnlm_dstore:
        for subset, split in zip(subsets, (windows, *others), strict=True):
            logprob = arguments.save_logprob and (subset != "train" or len(subsets) == 1)
            save(base, split, replace(arguments, eval_subset=subset, save_logprob=logprob), training, dtype)
    if not arguments.save_knnlm_dstore or arguments.knn:
        evaluate(base, windows, arguments, training)


def check_arguments(arguments: StageArguments, training: Any) -> None:
    """Check flags that do not go together before anything is loaded. Raises InputError."""
    if arguments.from_scratch:
        arguments.model_name_or_path = arguments.model_name_or_path or arguments.config_name
    if arguments.dstore_path and (training.do_train or arguments.save_knnlm_dstore):
        raise InputError("--dstore_path: no base is run; leave out --do_train and --save_knnlm_dstore")
    if not arguments.dstore_path:
        arguments.require_base()
    if not (training.do_train or training.do_eval or arguments.knn or arguments.save_knnlm_dstore):
        raise InputError("nothing to do: give --do_eval, --do_train, --knn or --save_knnlm_dstore")
    arguments.check_scored()
    check_at_least(1, training, "per_device_eval_batch_size")
    if len(arguments.eval_subset) > 1 and (training.do_train or arguments.knn or not arguments.save_knnlm_dstore):
        raise InputError(
            f"--eval_subset {' '.join(arguments.eval_subset)}: several only with --save_knnlm_dstore alone"
        )
    if arguments.knn and not (arguments.val_file and arguments.index_file):
        raise InputError("--knn: needs --val_file and --index_file")
    note_unused(("block_size", "stride"), "here: they are those of the windows in --dataset_name")
    if not arguments.knn:
        names = ("knn_gpu", "val_file", "index_file", "lmbda", "k", "knn_temp", "choose_on", "probe")
        note_unused(names, "without --knn")
    if not training.do_train:
        note_unused(("patience", "max_train_samples"), "without --do_train")
    if not arguments.save_knnlm_dstore:
        note_unused(("dstore_dir", "save_logprob"), "without --save_knnlm_dstore")


def save(base: Any, windows: Any, arguments: StageArguments, training: Any, dtype: Any) -> None:
    """Write the datastore of the split."""
    from knn_utils.saveEmbedMulti import datastore_name, save_datastore
    from utils.cli import say
    from utils.loading import made_id

    model_type, dim = base.config.model_type, base.config.hidden_size
    path = Path(arguments.dstore_dir) / datastore_name(model_type, arguments.eval_subset, dim)
    settings = {
        "model_type": model_type,
        "subset": arguments.eval_subset,
        "dim": dim,
        "vocab_size": base.get_input_embeddings().weight.shape[0],
        "dtype": str(dtype).removeprefix("torch."),
        "layer_position": arguments.layer_position,
        "logprob": arguments.save_logprob,
    }
    options = {
        "made_from": {"base": arguments.base_id(), "windows": made_id(arguments.dataset_name)},
        "batch_size": training.per_device_eval_batch_size,
        "layer_position": arguments.layer_position,
        "with_logprob": arguments.save_logprob,
        "overwrite": arguments.overwrite,
    }
    made = save_datastore(base, windows, path, settings=settings, **options)
    say(f"datastore {path}: {made.rows} rows of {dim}")


def evaluate(base: Any, windows: Any, arguments: StageArguments, training: Any) -> None:
    """Perplexity of the base, and with --knn of the kNN-LM over the grid, into results.json."""
    from knn_utils.scored_rows import scored_rows
    from utils.artefact import read_made, require
    from utils.evaluation import MixtureScore
    from utils.loading import made_id
    from utils.results import report_scores

    started, split, temperatures = time.time(), arguments.eval_subset, list(arguments.knn_temp)
    stored = read_made(arguments.dstore_path) if arguments.dstore_path else None
    base_id = stored.made_from.get("base") if stored else arguments.base_id()
    made_from = {"base": base_id, "windows": made_id(arguments.dataset_name)}
    about = {"model": arguments.model_name_or_path, "memory": None, "dataset": arguments.dataset_name, "split": split}
    fixed = [value for value in arguments.lmbda if value != ADAPTIVE]
    score = MixtureScore(fixed, arguments.knn_temp, "knn_temp")
    neighbours = adaptive = None
    if arguments.knn:
        from knn_utils.adaptive import adaptive_score
        from knn_utils.knn_lm import Neighbours

        about |= {"k": arguments.k, "index": arguments.index_file, "probe": arguments.probe}
        made_from["index"] = made_id(arguments.index_file)
        layer = arguments.layer_position
        search = {"k": arguments.k, "probe": arguments.probe, "knn_gpu": arguments.knn_gpu, "layer_position": layer}
        neighbours = Neighbours(arguments.index_file, arguments.val_file, **search)
        require(arguments.index_file, neighbours.searcher.made, base=base_id, layer_position=layer)
        if adaptive := adaptive_score(arguments, windows, neighbours):
            temperatures += [each for each in adaptive.knn_temp if each not in temperatures]
    for hidden, logprob, labels in scored_rows(base, windows, arguments, split, training.per_device_eval_batch_size):
        others = []
        if neighbours:
            other, nearest = neighbours.probability(hidden, labels, temperatures)  # (rows, temperatures)
            if adaptive:
                adaptive.add(logprob, other[:, [temperatures.index(each) for each in adaptive.knn_temp]], nearest)
            others = [other[:, : len(arguments.knn_temp)].log()]
        score.add(logprob, *others)
    mixture = {"mixture": "kNN-LM", "adaptive": adaptive and adaptive.finish(score)} if arguments.knn else {}
    report_scores(score, training.output_dir or "trainer_output", about, made_from, **mixture, started=started)


if __name__ == "__main__":
    command(main, training="--do_train" in sys.argv)()
