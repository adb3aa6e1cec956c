"""The base model's stage: fine-tune it, score it (alone or as a kNN-LM), save its datastore.

python -m train_base --do_eval ...                      perplexity
python -m train_base --do_eval --save_knnlm_dstore ...  datastore of (hidden state, next token)
python -m train_base --do_eval --knn ...                perplexity of the kNN-LM
python -m train_base --do_train ...                     fine-tuning with the Hugging Face Trainer
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils.cli import command, flag, make_parser, note_unused, parse, started_together
from utils.errors import InputError, check_at_least, check_positive, check_seed
from utils.results import ADAPTIVE, ScoreArguments

DESCRIPTION = "Fine-tune, score or embed with a base language model."
COMPILE_MODES = ("default", "lite", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # torch.compile's


@dataclass
class StageArguments(ScoreArguments):
    """Base model, windows, datastore and kNN-LM."""

    config_name: str | None = flag(None, "config to use instead of the base's own")
    from_scratch: bool = flag(False, "begin with random weights made from the config")
    eval_subset: str = flag("validation", "split to score or to embed, and the one that --patience watches")
    max_train_samples: int | None = flag(None, "use this many training windows at most")
    block_size: int = flag(1024, "of the original's command line; the windows have the length they were made with")
    stride: int = flag(512, "of the original's command line; the windows have the stride they were made with")
    patience: int | None = flag(None, "fine-tuning: stop after this many evaluations without improvement")
    knn: bool = flag(False, "score the kNN-LM: needs --val_file and --index_file")
    knn_gpu: bool = flag(False, "search on the GPU")
    save_knnlm_dstore: bool = flag(False, "write the datastore of --eval_subset into --dstore_dir")
    save_logprob: bool = flag(False, "with --save_knnlm_dstore: also keep the base's log-probability of each value")
    dstore_dir: str = flag("dstore", "folder of the datastore")
    single_file: bool = flag(False, "write the datastore as one Arrow stream, as the original does")
    overwrite: bool = flag(False, "replace a datastore, or a fine-tuning, that was made with other settings")
    extend: bool = flag(False, "add the windows that follow those of the datastore that is there, as further parts")
    val_file: str | None = flag(None, "values of the indexed rows: a datastore, .npy, or the original's .pkl name")
    index_file: str | None = flag(None, "FAISS index")
    k: int = flag(1024, "neighbours")
    probe: int = flag(32, "inverted lists searched")


def main() -> None:
    if "--help" in sys.argv or "-h" in sys.argv:
        # TrainingArguments would import torch; its flags are documented by transformers.
        parser = make_parser((StageArguments,), DESCRIPTION)
        parser.epilog = "Every flag of transformers.TrainingArguments is accepted too (--do_eval, --output_dir, …)."
        parser.parse_args(["--help"])
    from transformers import set_seed

    from training.finetune import FinetuneArguments

    arguments, training = parse(StageArguments, FinetuneArguments, description=DESCRIPTION)
    check_arguments(arguments, training)
    import torch

    from utils.loading import check_windows, load_windows, quiet_libraries

    quiet_libraries()
    windows = None
    if wants_evaluation(arguments, training):
        windows = load_windows(arguments.dataset_name, arguments.eval_subset, arguments.max_eval_samples)
    if arguments.dstore_path:
        evaluate(None, windows, arguments, training)
        return
    dtype = arguments.dtype(bf16=training.bf16, fp16=training.fp16)
    if training.do_train:
        dtype = torch.float32
    tokenizer = arguments.open_tokenizer()
    set_seed(training.seed)  # of the random weights of --from_scratch
    base = arguments.open_base(
        tokenizer, dtype=dtype, config_name=arguments.config_name, from_scratch=arguments.from_scratch
    )
    if windows is not None:
        arguments.captured(base)
        check_windows(arguments.dataset_name, windows, base.config, tokenizer)
    if training.do_train:
        from training.finetune import finetune

        result = finetune(base, tokenizer, arguments, training, overwrite=arguments.overwrite)
        if windows is None:
            return
        base = replace(arguments, model_name_or_path=str(result)).open_base(tokenizer, dtype=dtype)
    if arguments.save_knnlm_dstore:
        save(base, windows, arguments, training, dtype)
    if not arguments.save_knnlm_dstore or arguments.knn:
        evaluate(base, windows, arguments, training)


def wants_evaluation(arguments: StageArguments, training: Any) -> bool:
    return bool(training.do_eval or arguments.knn or arguments.save_knnlm_dstore or arguments.dstore_path)


def check_arguments(arguments: StageArguments, training: Any) -> None:
    """Refuse what cannot work before anything is loaded. Raises InputError."""
    if not (training.do_train or wants_evaluation(arguments, training)):
        raise InputError("nothing to do: give --do_eval, --do_train, --knn or --save_knnlm_dstore")
    if training.do_train and arguments.device_map and started_together():
        raise InputError(
            f"--device_map {arguments.device_map}: is not for fine-tuning by several processes; leave it out"
        )
    if arguments.from_scratch:
        arguments.model_name_or_path = arguments.model_name_or_path or arguments.config_name
    arguments.check_scored(knn=True)
    check_numbers(arguments, training)
    if arguments.knn:
        for name in ("val_file", "index_file"):
            if getattr(arguments, name) is None:
                raise InputError(f"--knn: needs --{name}")
        from knn_utils.faiss_files import check_faiss

        check_faiss()
    note_unused(("ddp_timeout",), "here: MLPMEM_TIMEOUT_MINUTES says how long processes wait for each other")
    note_unused(("block_size", "stride"), "here: the windows of --dataset_name have those they were made with")
    if not arguments.knn:
        names = ("knn_gpu", "val_file", "index_file", "lmbda", "k", "knn_temp", "choose_on", "probe")
        note_unused(names, "without --knn")
    if arguments.dstore_path and (training.do_train or arguments.save_knnlm_dstore):
        raise InputError(
            "--dstore_path: scores stored rows, no base is run; leave out --do_train and --save_knnlm_dstore"
        )
    if not arguments.save_knnlm_dstore:
        note_unused(("dstore_dir", "save_logprob", "single_file", "extend"), "without --save_knnlm_dstore")
    if not training.do_train:
        note_unused(("patience", "max_train_samples"), "without --do_train")
    else:
        note_unused(
            ("torch_dtype",), "with --do_train: its weights are float32, --bf16 and --fp16 compute in half of it"
        )
    if training.do_train and (arguments.load_in_4bit or arguments.load_in_8bit):
        raise InputError("--load_in_4bit/--load_in_8bit: hold a frozen base; fine-tuning needs its full weights")


def check_numbers(arguments: StageArguments, training: Any) -> None:
    """Refuse numbers that no stage takes, and that transformers does not refuse itself. Raises InputError."""
    check_at_least(1, arguments, "max_train_samples", "patience", "k", "probe", "block_size", "stride")
    batch_sizes = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
    check_at_least(1, training, *batch_sizes, *(("max_steps",) if training.max_steps != -1 else ()))
    check_at_least(0, training, "weight_decay", "max_grad_norm", "adam_epsilon", "adam_beta1", "adam_beta2")
    check_at_least(0, training, "dataloader_num_workers", "neftune_noise_alpha", "label_smoothing_factor")
    for name, value in vars(training).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{name} {value}: expected a finite number")
    for name in ("learning_rate", "num_train_epochs"):
        check_positive(f"--{name}", getattr(training, name))
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(training, name) >= 1:
            raise InputError(f"--{name} {getattr(training, name)}: expected a number below 1")
    for name in ("seed", "data_seed"):
        check_seed(f"--{name}", getattr(training, name))
    if training.torch_compile_mode not in (None, *COMPILE_MODES):
        raise InputError(f"--torch_compile_mode {training.torch_compile_mode}: expected {', '.join(COMPILE_MODES)}")


def save(base: Any, windows: Any, arguments: StageArguments, training: Any, dtype: Any) -> None:
    """Write the datastore of the split, and print its perplexity when the log-probabilities were kept."""
    from knn_utils.saveEmbedMulti import datastore_name, save_datastore
    from utils.cli import say
    from utils.loading import model_fingerprint, windows_fingerprint

    dim = base.config.hidden_size
    path = Path(arguments.dstore_dir) / datastore_name(base.config.model_type, arguments.eval_subset, dim)
    settings = {
        "model": model_fingerprint(base),
        "model_type": base.config.model_type,
        "dataset": windows_fingerprint(windows),
        "subset": arguments.eval_subset,
        "dim": dim,
        "vocab_size": base.get_input_embeddings().weight.shape[0],
        "dtype": str(dtype).removeprefix("torch."),
        "layer_position": arguments.layer_position,
        "logprob": arguments.save_logprob,
    }
    manifest = save_datastore(
        base,
        windows,
        path,
        settings=settings,
        info={"model_path": str(arguments.model_name_or_path), "dataset_path": str(arguments.dataset_name)},
        batch_size=training.per_device_eval_batch_size,
        layer_position=arguments.layer_position,
        with_logprob=arguments.save_logprob,
        overwrite=arguments.overwrite,
        extend=arguments.extend,
        single_file=arguments.single_file,
    )
    say(f"datastore {path}: {manifest['rows']} rows of {dim}")


def evaluate(base: Any, windows: Any, arguments: StageArguments, training: Any) -> None:
    """Perplexity of the base, and with --knn of the kNN-LM over the grid, into results.json."""
    from knn_utils.scored_rows import scored_rows
    from utils.evaluation import MixtureScore
    from utils.results import report_scores

    started = time.time()
    knn_temp, neighbours, adaptive, search = arguments.knn_temp, None, None, {}
    score = MixtureScore([value for value in arguments.lmbda if value != ADAPTIVE], knn_temp)
    if arguments.knn:
        from knn_utils.adaptive import adaptive_score
        from knn_utils.knn_lm import Neighbours

        search = {"k": arguments.k, "index": str(arguments.index_file), "probe": arguments.probe}
        neighbours = Neighbours(
            arguments.index_file,
            arguments.val_file,
            k=arguments.k,
            probe=arguments.probe,
            knn_gpu=arguments.knn_gpu,
            layer_position=arguments.layer_position,
        )
        check_indexed(neighbours.searcher, base, arguments)
        adaptive = adaptive_score(arguments, windows, neighbours)
        knn_temp = [*knn_temp, *(each for each in (adaptive.knn_temp if adaptive else ()) if each not in knn_temp)]
    batch_size = training.per_device_eval_batch_size
    for hidden, logprob, labels in scored_rows(base, windows, arguments, arguments.eval_subset, batch_size):
        other = None
        if neighbours is not None:
            other, nearest = neighbours.probability(hidden, labels, knn_temp)
            if adaptive:
                adaptive.add(logprob, other[:, [knn_temp.index(each) for each in adaptive.knn_temp]], nearest)
            other = other[:, : len(arguments.knn_temp)]
        score.add(logprob, other, other_is_probability=True)
    report_scores(
        score,
        "kNN-LM" if arguments.knn else None,
        training.output_dir or "trainer_output",
        started,
        adaptive=adaptive and adaptive.result(),
        model=str(arguments.model_name_or_path),
        memory=None,
        dataset=str(arguments.dataset_name),
        split=arguments.eval_subset,
        **search,
    )


def check_indexed(searcher: Any, base: Any, arguments: StageArguments) -> None:
    """Refuse an index of hidden states of another base than is scored. Raises InputError."""
    from utils.legacy import check_made

    if arguments.dstore_path:
        from knn_utils.belonging import check_queries
        from knn_utils.datastore import Datastore

        check_queries(searcher, arguments.dstore_path, Datastore.open(arguments.dstore_path).settings)
    else:
        check_made(searcher.path, searcher.made, model=arguments.fingerprint(searcher.made, base))


if __name__ == "__main__":
    command(main, training="--do_train" in sys.argv)()
