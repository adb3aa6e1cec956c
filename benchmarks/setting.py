"""The setting that everything is measured at: model, text, sizes; and the files of each stage, made when missing.

The windows hold exactly the asked number of datastore rows: tokens are counted, not documents. Files are made by the
project's own commands, in a folder named by what determines them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.cli import flag
from utils.errors import InputError, check_positive, one_line

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = Path("dataset/embedded")
PRECISIONS = {"no": "float32", "bf16": "bfloat16"}
OPEN = "--model_name_or_path {model} --dataset_name {windows} --report_to none"
SEARCHED = "--dstore_path {dstore} --index_path {folder}/train.index --probe {probe}"
# The stages of the chain, in order: module and flags.
STEPS = {
    "embed": f"train_base {OPEN} --do_eval --eval_subset train --per_device_eval_batch_size 4 --torch_dtype {{dtype}} "
    "--save_knnlm_dstore --dstore_dir {folder}/dstore --output_dir {folder}/embed",
    "index": f"knn_utils.build_index {SEARCHED} --ncentroids {{ncentroids}} --code_size {{code_size}}",
    "targets": f"knn_utils.saveKNNMulti {SEARCHED} --output_path {{folder}}/targets --k {{k}} --knn_temp 16 "
    "--ignore_first True",
    "train": f"train_mlpmem_offline {OPEN} --knn_save_path {{folder}}/targets --knn_dstore_path {{dstore}} "
    "--output_dir {folder}/memory --memory_layers {memory_layers} --num_train_epochs 2 --learning_rate 5e-4 --seed 0 "
    "--per_device_train_batch_size {step_windows} --validation_split_name none --mixed_precision {precision}",
    "joint": f"evaluate_joint {OPEN} --do_test --dataset_split_name test --output_dir {{folder}}/joint "
    "--knn_generator_path {folder}/memory/epoch_2 --per_device_eval_batch_size 4 --torch_dtype {dtype}",
}
SAMPLE_SECONDS = 0.005


@dataclass
class BenchmarkArguments:
    """Where, how often, how large. The defaults are the setting of the targets."""

    output_dir: str = flag("results/benchmarks", "folder of results.json, targets.png and the stages' files (work/)")
    model: str | None = flag(None, "folder of the base model; default: SmolLM2-135M of utils.embedded_default")
    text: str | None = flag(None, "text file; default: the Wikipedia articles of utils.embedded_default")
    device: str = flag("cpu", "cpu or cuda")
    repeats: int = flag(3, "timed rounds, after one of warm-up")
    rows: int = flag(24575, "datastore rows; taken to a multiple of --block_size less one")
    block_size: int = flag(1024, "tokens of a window")
    stride: int = flag(512, "tokens from one window to the next")
    memory_layers: int = flag(8, "layers of the memory")
    k: int = flag(1024, "neighbours")
    ncentroids: int = flag(128, "inverted lists")
    probe: int = flag(16, "inverted lists searched")
    code_size: int = flag(64, "bytes of a compressed key")

    def check(self) -> None:
        """Refuse what cannot be measured. Raises InputError."""
        for name, value in vars(self).items():
            if isinstance(value, int):
                check_positive(f"--{name}", value)
        if self.device not in ("cpu", "cuda"):
            raise InputError(f"--device {self.device}: expected cpu or cuda")
        import torch

        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: torch sees no GPU here; leave the flag out")


@dataclass
class Setting(BenchmarkArguments):
    """The flags made definite: whole windows, absolute paths; and the files that are measured.

    `rows` is one less than a multiple of `block_size`, and so is `test_rows`, of the windows that evaluation scores.
    """

    test_rows: int = 0

    @classmethod
    def of(cls, arguments: BenchmarkArguments) -> Setting:
        """The setting that the flags ask for; fetches the embedded model and text where none are named."""
        paths = {"model": arguments.model or EMBEDDED / "model", "text": arguments.text or EMBEDDED / "wiki.txt"}
        if not (arguments.model and arguments.text) and not all(Path(path).exists() for path in paths.values()):
            subprocess.run([sys.executable, "-m", "utils.embedded_default", "--output_dir", EMBEDDED], check=True)
        for name, path in paths.items():
            if not Path(path).exists():
                raise InputError(f"--{name} {path}: no such file or folder")
        values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(BenchmarkArguments)}
        values |= {name: str(Path(path).resolve()) for name, path in paths.items()}
        values["output_dir"] = str(Path(arguments.output_dir).resolve())
        values["rows"] = whole_windows(arguments.rows, arguments.block_size)
        values["test_rows"] = whole_windows(max(arguments.rows // 3, arguments.block_size), arguments.block_size)
        return cls(**values)

    def record(self) -> dict[str, Any]:
        """The setting without the machine's folders."""
        names = {name: Path(getattr(self, name)).name for name in ("model", "text")}
        return {name: value for name, value in vars(self).items() if name != "output_dir"} | names

    # -- files ------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """Of the stages' files, named by what they depend on."""
        elsewhere = ("output_dir", "device", "repeats")
        identity = {name: value for name, value in vars(self).items() if name not in elsewhere}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]
        return Path(self.output_dir) / "work" / digest

    def chain_folder(self, precision: str = "no") -> Path:
        """Where the chain's files of a precision are."""
        return self.folder / PRECISIONS[precision]

    def datastore(self, precision: str = "no") -> Path:
        """The chain's datastore, or where it would be."""
        folder = self.chain_folder(precision) / "dstore"
        return next(folder.glob("dstore_*_train_*.arrow"), folder / "dstore.arrow")

    def windows(self, split: str = "train") -> Any:
        """The windows of a split, a `datasets.Dataset`; made where they are missing."""
        from utils.loading import load_windows

        if not (self.folder / "windows").exists():
            make_windows(self)
        return load_windows(self.folder / "windows", split)

    def base(self, dtype: str = "float32") -> Any:
        """The base model, in evaluation mode, without gradients."""
        from utils.loading import BaseArguments, quiet_libraries

        quiet_libraries()
        arguments = BaseArguments(self.model, torch_dtype=dtype)
        return arguments.open_base(arguments.open_tokenizer(), device=self.device).requires_grad_(False)

    def memory(self) -> Any:
        """A memory with random float32 weights: time and memory do not depend on their values."""
        import torch
        from transformers import AutoConfig

        from models import memory_class
        from models.stack import memory_config, vocabulary_size
        from utils.loading import load_tokenizer

        config = memory_config(AutoConfig.from_pretrained(self.model), self.memory_layers)
        tokenizer = load_tokenizer(self.model)
        config.vocab_size = config.vocab_size if tokenizer is None else vocabulary_size(tokenizer)
        torch.manual_seed(0)
        return memory_class(config)(config).to(self.device, torch.float32).eval()

    # -- commands ---------------------------------------------------------------------------------------

    def step(self, step: str, precision: str = "no", **changes: object) -> list[str]:
        """Module and flags of one stage of the chain; of a flag that is there twice, as a changed one, the last counts."""
        values = vars(self) | {
            "windows": self.folder / "windows",
            "folder": self.chain_folder(precision),
            "dstore": self.datastore(precision),
            "dtype": PRECISIONS[precision],
            "precision": precision,
            "step_windows": max(2048 // self.stride, 1),
        }
        words = [word.format(**values) for word in STEPS[step].split()]
        return words + [str(word) for name, value in changes.items() for word in (f"--{name}", value)]

    def run_step(self, step: str, precision: str = "no", **changes: object) -> float:
        """Run one stage of the chain; returns its seconds. Raises InputError when it fails."""
        return self.run("-m", *self.step(step, precision, **changes))

    def run(self, *command: object, watch: Callable[[int], None] | None = None) -> float:
        """Run `python …` from the repository's root, on the setting's device; returns its seconds.

        Args:
            watch: called with the process's number, again and again until it ends.

        Raises:
            InputError: it failed; the end of what it said.
        """
        hidden = {} if self.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        environment = {**os.environ, **hidden, "TOKENIZERS_PARALLELISM": "false"}
        with tempfile.TemporaryFile("w+") as said:
            start = time.perf_counter()
            words = [sys.executable, *map(str, command)]
            process = subprocess.Popen(
                words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said
            )
            while watch and process.poll() is None:
                watch(process.pid)
                time.sleep(SAMPLE_SECONDS)
            status, seconds = process.wait(), time.perf_counter() - start
            if status:
                said.seek(0)
                lines = [line for line in said if line.strip()] or [f"exit status {status}"]
                name = command[1] if command[0] == "-m" else "python"
                raise InputError(f"{name}: failed, {one_line(lines[-1], 400)}")
        return seconds

    def watched(self, *command: str) -> dict[str, float]:
        """Run a module with flags: its seconds, and its peak of anonymous memory (what is not mapped from files)."""
        peak = 0

        def watch(process: int) -> None:
            nonlocal peak
            # No such line: a process that has just ended; no such file: another system than Linux.
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{process}/status").read_text().splitlines()
                peak = max(peak, *(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)

        return {"seconds": self.run("-m", *command, watch=watch), "peak_bytes": peak}

    def prepare(self, upto: str) -> Setting:
        """Make the windows and the float32 files of the stages up to `upto`, where they are missing."""
        self.windows()
        for step in [*STEPS][: [*STEPS].index(upto) + 1]:
            # Complete outputs are recognised by the commands themselves; the mark spares starting them.
            mark = self.chain_folder() / f"{step}.done"
            if not mark.exists():
                self.run_step(step)
                mark.touch()
        return self


def whole_windows(rows: int, block_size: int) -> int:
    """The nearest number of rows that whole windows of overlapping text have: a multiple of `block_size` less one."""
    return max(round((rows + 1) / block_size), 1) * block_size - 1


def make_windows(setting: Setting) -> None:
    """Write the windows folder: train, test, exactly as many tokens as the rows ask for."""
    import datasets
    import numpy as np

    from utils.legacy import atomic_folder
    from utils.loading import load_tokenizer
    from utils.windows import WindowSizes, cut_windows

    sizes = WindowSizes(setting.block_size, setting.stride)
    tokenizer = load_tokenizer(setting.model, required=True)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    wanted = setting.rows + 1 + setting.test_rows + 1
    text = Path(setting.text).read_text(encoding="utf-8")
    found: list[int] = []
    # A token has about four characters; no more of the text is tokenized than is needed.
    for start in range(0, len(text), 1 << 18):
        if len(found) < wanted:
            found += tokenizer(text[start : start + (1 << 18)], verbose=False)["input_ids"]
    if len(found) < wanted:
        raise InputError(f"--text {setting.text}: has {len(found)} tokens, {wanted} are needed; ask for fewer --rows")
    train, test = np.split(np.asarray(found[:wanted], dtype=np.int32), [setting.rows + 1])
    splits = {}
    for split, tokens in (("train", train), ("test", test)):
        pieces = list(cut_windows(tokens, sizes, pad))
        ids, labels = (np.concatenate(column) for column in zip(*pieces, strict=True))  # (windows, block_size) each
        ends = (labels[:, 1:] != sizes.padding_index).sum(1).cumsum()
        columns = {"input_ids": ids, "labels": labels, "attention_mask": np.ones(ids.shape, dtype=np.int8)}
        columns["dstore_range"] = np.stack([[0, *ends[:-1]], ends], axis=1)
        splits[split] = datasets.Dataset.from_dict(columns)
    with atomic_folder(setting.folder / "windows") as folder:
        datasets.DatasetDict(splits).save_to_disk(str(folder))
