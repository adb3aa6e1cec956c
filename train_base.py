"""The base model's stage: fine-tune it, score it (alone or as a kNN-LM), save its datastore.

python -m train_base --do_eval ...                      perplexity
python -m train_base --do_eval --save_knnlm_dstore ...  datastore of (hidden state, next token)
python -m train_base --do_eval --knn ...                perplexity of the kNN-LM
python -m train_base --do_train ...                     fine-tuning with the Hugging Face Trainer
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.cli import check_grid, flag, make_parser, note_unused, parse
from utils.errors import InputError, command

DESCRIPTION = "Fine-tune, score or embed with a base language model."


@dataclass
class ModelArguments:
    """Which base model, and how it is held in memory."""

    model_name_or_path: str | None = flag(None, "folder or hub name of the base model")
    config_name: str | None = flag(None, "config to use instead of the model's own")
    tokenizer_name: str | None = flag(None, "tokenizer to use instead of the model's own")
    from_scratch: bool = flag(False, "begin with random weights made from the config")
    torch_dtype: str | None = flag(None, "weights' dtype: float32 (default), bfloat16, float16, or auto")
    device_map: str | None = flag(None, "accelerate's placement over several devices, for example auto")
    load_in_4bit: bool = flag(False, "quantise the frozen base to 4 bits (needs bitsandbytes)")
    load_in_8bit: bool = flag(False, "quantise the frozen base to 8 bits (needs bitsandbytes)")
    trust_remote_code: bool = flag(False, "run the code in the model's repository")
    layer_position: int = flag(-1, "decoder block whose MLP input is the hidden state (0 = first, -1 = last)")


@dataclass
class DataArguments:
    """Which windows."""

    dataset_name: str | None = flag(None, "windows folder made by utils/preprocess_dataset.py")
    eval_subset: str = flag("validation", "split to score or to embed, and the one that --patience watches")
    max_train_samples: int | None = flag(None, "use this many training windows at most")
    max_eval_samples: int | None = flag(None, "use this many windows of the scored split at most")
    block_size: int = flag(1024, "of the original's command line; the windows have the length they were made with")
    stride: int = flag(512, "of the original's command line; the windows have the stride they were made with")
    patience: int | None = flag(None, "fine-tuning: stop after this many evaluations without improvement")


@dataclass
class KNNArguments:
    """Datastore and kNN-LM."""

    knn: bool = flag(False, "score the kNN-LM: needs --val_file and --index_file")
    knn_gpu: bool = flag(False, "search on the GPU")
    save_knnlm_dstore: bool = flag(False, "write the datastore of --eval_subset into --dstore_dir")
    save_logprob: bool = flag(False, "with --save_knnlm_dstore: also keep the base's log-probability of each value")
    dstore_dir: str = flag("dstore", "folder of the datastore")
    dstore_path: str | None = flag(
        None, "score from this datastore of --eval_subset (made with --save_logprob) instead of running the base"
    )
    single_file: bool = flag(False, "write the datastore as one Arrow stream, as the original does")
    overwrite: bool = flag(False, "replace a datastore, or a fine-tuning, that was made with other settings")
    extend: bool = flag(False, "add the windows that follow those of the datastore that is there, as further parts")
    val_file: str | None = flag(None, "values of the indexed rows: a datastore, .npy, or the original's .pkl name")
    index_file: str | None = flag(None, "FAISS index")
    lmbda: list[float] = flag([0.25], "weight of the kNN, one or several values")
    k: int = flag(1024, "neighbours")
    knn_temp: list[float] = flag([1.0], "temperature of the kNN distribution, one or several values")
    choose_on: str | None = flag(
        None, "with --knn: results.json of another split, whose best lambda and temperature are used"
    )
    probe: int = flag(32, "inverted lists searched")
    refine_factor: int = flag(0, "re-rank k times this many candidates by exact distance (needs --val_file datastore)")


def main() -> None:
    if "--help" in sys.argv or "-h" in sys.argv:
        # TrainingArguments would import torch; its flags are documented by transformers.
        parser = make_parser((ModelArguments, DataArguments, KNNArguments), DESCRIPTION)
        parser.epilog = "Every flag of transformers.TrainingArguments is accepted too (--do_eval, --output_dir, …)."
        parser.parse_args(["--help"])
    from transformers import TrainingArguments

    model, data, knn, training = parse(
        ModelArguments, DataArguments, KNNArguments, TrainingArguments, description=DESCRIPTION
    )
    if knn.choose_on:
        from utils.evaluation import chosen

        knn.lmbda, knn.knn_temp = chosen(knn.choose_on)
    check_arguments(model, data, knn, training)
    from utils.base_model import load_base, load_tokenizer
    from utils.loading import load_windows, quiet_libraries, resolve_dtype

    quiet_libraries()
    windows = load_windows(data.dataset_name, data.eval_subset) if wants_evaluation(knn, training) else None
    name = model.model_name_or_path or model.config_name
    if model.torch_dtype == "auto" and knn.save_knnlm_dstore and not knn.overwrite:
        model.torch_dtype = begun_in(knn.dstore_dir, data.eval_subset) or "auto"
    dtype = resolve_dtype(model.torch_dtype, bf16=training.bf16 and not training.do_train, fp16=training.fp16)
    if training.do_train:
        import torch

        dtype = torch.float32
    if knn.dstore_path:
        evaluate(None, limited(windows, data), model, data, knn, training)
        return
    tokenizer = load_tokenizer(model.tokenizer_name or name, trust_remote_code=model.trust_remote_code)
    options = {
        "tokenizer": tokenizer,
        "dtype": dtype,
        "device_map": model.device_map,
        "load_in_4bit": model.load_in_4bit,
        "load_in_8bit": model.load_in_8bit,
        "config_name": model.config_name,
        "from_scratch": model.from_scratch,
        "trust_remote_code": model.trust_remote_code,
    }
    if model.from_scratch:
        from transformers import set_seed

        set_seed(training.seed)
    base = load_base(name, **options)
    if training.do_train:
        from utils.finetune import finetune

        result = finetune(base, tokenizer, data, training, overwrite=knn.overwrite)
        if windows is not None:
            base = load_base(result, **options | {"config_name": None, "from_scratch": False})
    if windows is None:
        return
    windows = limited(windows, data)
    if knn.save_knnlm_dstore:
        save(base, windows, model, data, knn, training, dtype)
    if not knn.save_knnlm_dstore or knn.knn:
        evaluate(base, windows, model, data, knn, training)


def begun_in(folder: str, subset: str) -> str | None:
    """The precision of a datastore that is there already, which a timing may not choose again; None without one."""
    from knn_utils.manifest import MANIFEST_NAME
    from utils.files import read_json

    found = list(Path(folder).glob(f"dstore_*_{subset}_*.arrow/{MANIFEST_NAME}"))
    return read_json(found[0]).get("settings", {}).get("dtype") if len(found) == 1 else None


def limited(windows: Any, data: DataArguments) -> Any:
    """The windows to score, at most --max_eval_samples."""
    if data.max_eval_samples is None:
        return windows
    return windows.select(range(min(data.max_eval_samples, len(windows))))


def wants_evaluation(knn: KNNArguments, training: Any) -> bool:
    return training.do_eval or knn.knn or knn.save_knnlm_dstore


def check_arguments(model: ModelArguments, data: DataArguments, knn: KNNArguments, training: Any) -> None:
    """Refuse what cannot work before anything is loaded. Raises InputError."""
    if not (training.do_train or wants_evaluation(knn, training)):
        raise InputError("nothing to do: give --do_eval, --do_train, --knn or --save_knnlm_dstore")
    if not (model.model_name_or_path or (model.config_name and model.from_scratch) or knn.dstore_path):
        raise InputError("--model_name_or_path: expected a model folder or hub name")
    if data.dataset_name is None:
        raise InputError("--dataset_name: expected a windows folder made by utils/preprocess_dataset.py")
    check_grid(knn.lmbda, knn.knn_temp)
    if knn.knn:
        for name in ("val_file", "index_file"):
            if getattr(knn, name) is None:
                raise InputError(f"--knn: needs --{name}")
        if knn.k < 1:
            raise InputError(f"--k {knn.k}: expected at least 1")
    note_unused(("block_size", "stride"), "here: the windows of --dataset_name have those they were made with")
    if not knn.knn:
        names = ("knn_gpu", "val_file", "index_file", "lmbda", "k", "knn_temp", "choose_on", "probe", "refine_factor")
        note_unused(names, "without --knn")
    if not knn.save_knnlm_dstore:
        note_unused(("dstore_dir", "save_logprob", "single_file", "extend"), "without --save_knnlm_dstore")
    if not training.do_train:
        note_unused(("patience", "max_train_samples"), "without --do_train")
    if training.do_train and (model.load_in_4bit or model.load_in_8bit):
        raise InputError("--load_in_4bit/--load_in_8bit: hold a frozen base; fine-tuning needs its full weights")
    if training.bf16 and training.fp16:
        raise InputError("--bf16 and --fp16: expected one of them")


def save(
    base: Any, windows: Any, model: ModelArguments, data: DataArguments, knn: KNNArguments, training: Any, dtype: Any
) -> None:
    """Write the datastore of the split, and print its perplexity when the log-probabilities were kept."""
    from knn_utils.saveEmbedMulti import datastore_name, save_datastore
    from utils.loading import model_fingerprint, say, windows_fingerprint

    dim = base.config.hidden_size
    path = Path(knn.dstore_dir) / datastore_name(base.config.model_type, data.eval_subset, dim)
    settings = {
        "model": model_fingerprint(base),
        "model_type": base.config.model_type,
        "dataset": windows_fingerprint(windows),
        "subset": data.eval_subset,
        "dim": dim,
        "vocab_size": base.get_input_embeddings().weight.shape[0],
        "dtype": str(dtype).removeprefix("torch."),
        "layer_position": model.layer_position,
        "logprob": knn.save_logprob,
    }
    manifest = save_datastore(
        base,
        windows,
        path,
        settings=settings,
        info={"model_path": str(model.model_name_or_path), "dataset_path": str(data.dataset_name)},
        batch_size=training.per_device_eval_batch_size,
        layer_position=model.layer_position,
        with_logprob=knn.save_logprob,
        overwrite=knn.overwrite,
        extend=knn.extend,
        single_file=knn.single_file,
    )
    say(f"datastore {path}: {manifest['rows']} rows of {dim}")


def evaluate(
    base: Any, windows: Any, model: ModelArguments, data: DataArguments, knn: KNNArguments, training: Any
) -> None:
    """Perplexity of the base, and with --knn of the kNN-LM over the grid, into results.json."""
    from utils.evaluation import MixtureScore, best_line, write_results
    from utils.loading import say

    started = time.time()
    score = MixtureScore(knn.lmbda, knn.knn_temp)
    neighbours = None
    if knn.knn:
        from knn_utils.knn_lm import Neighbours

        neighbours = Neighbours(
            knn.index_file,
            knn.val_file,
            k=knn.k,
            probe=knn.probe,
            knn_gpu=knn.knn_gpu,
            refine_factor=knn.refine_factor,
            layer_position=model.layer_position,
        )
    for hidden, logprob, labels in scored_rows(base, windows, model, data, knn, training):
        other = None if neighbours is None else neighbours.probability(hidden, labels, knn.knn_temp)
        score.add(logprob, other, other_is_probability=True)
    score.reduce()
    tokens = int(score.tokens.item())
    if tokens == 0:
        raise InputError(f"--dataset_name {data.dataset_name}: split {data.eval_subset} holds no token to predict")
    results = {
        "perplexity": score.base_perplexity(),
        "base_perplexity": score.base_perplexity(),
        "tokens": tokens,
        "lmbda": 0.0,
        "knn_temp": None,
        "grid": [],
        "model": str(model.model_name_or_path),
        "memory": None,
        "dataset": str(data.dataset_name),
        "split": data.eval_subset,
    }
    say(f"base: perplexity {results['base_perplexity']:.4f} ({tokens} tokens, token-weighted)")
    if knn.knn:
        best = score.best()
        results |= best | {"grid": score.grid(), "k": knn.k, "index": str(knn.index_file), "probe": knn.probe}
        say(best_line("kNN-LM", best, tokens))
    from accelerate import PartialState

    if PartialState().is_main_process:
        write_results(training.output_dir or "trainer_output", results, started)


def scored_rows(
    base: Any, windows: Any, model: ModelArguments, data: DataArguments, knn: KNNArguments, training: Any
) -> Any:
    """(hidden states, base log-probabilities, labels) by batch: from the base, or from a stored datastore."""
    from utils.evaluation import Scorer, check_token_ids

    if knn.dstore_path:
        from knn_utils.datastore import count_rows, open_scored_datastore, stored_rows

        expected = int(count_rows(windows).sum())
        return stored_rows(open_scored_datastore(knn.dstore_path, rows=expected, layer_position=model.layer_position))
    check_token_ids(windows, base.get_input_embeddings().weight.shape[0], data.dataset_name)
    scorer = Scorer(base, model.layer_position)
    return scorer.batches(windows, training.per_device_eval_batch_size, description=f"score {data.eval_subset}")


if __name__ == "__main__":
    command(main)()
