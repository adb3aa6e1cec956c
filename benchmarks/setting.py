"""The setting of all measurements: model, text and sizes; and the files of each stage, made where they are missing.

The windows hold exactly the requested number of datastore rows. All files are made by the project's own commands, in a
folder named after the settings that they depend on.
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
from utils.errors import InputError, one_line

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
SAMPLE_SECONDS = 0.005  # between two looks at a process's memory


@dataclass
class BenchmarkArguments:
    """Where, how often, how large. The targets are for the default sizes."""

    output_dir: str = flag("results/benchmarks", "folder of results.json, targets.png and the stages' files (work/)")
    model: str | None = flag(None, "folder of the base model; default: SmolLM2-135M of utils.embedded_default")
    text: str | None = flag(None, ".txt file, or .jsonl with the column text; default: the embedded Wikipedia articles")
    device: str = flag("cpu", "cpu or cuda")
    repeats: int = flag(3, "timed rounds, after a warm-up round")
    rows: int = flag(24575, "datastore rows; rounded to a multiple of --block_size less one")
    block_size: int = flag(1024, "tokens of a window")
    stride: int = flag(512, "tokens from one window to the next")
    memory_layers: int = flag(8, "layers of the memory")
    k: int = flag(1024, "neighbors")
    ncentroids: int = flag(128, "inverted lists")
    probe: int = flag(16, "inverted lists searched")
    code_size: int = flag(64, "bytes of a compressed key")


@dataclass
class Setting(BenchmarkArguments):
    """The flags with whole windows and absolute paths, and the files that are measured."""

    test_rows: int = 0  # of the windows that evaluation scores

    @classmethod
    def of(cls, arguments: BenchmarkArguments) -> Setting:
        """The setting that the flags ask for. Downloads the default model and text if none are named."""
        if not (arguments.model and arguments.text):
            subprocess.run([sys.executable, "-m", "utils.embedded_default", "--output_dir", EMBEDDED], check=True)
        paths = {"model": arguments.model or EMBEDDED / "model", "text": arguments.text or EMBEDDED / "wiki.jsonl"}
        paths["output_dir"] = arguments.output_dir
        values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(BenchmarkArguments)}
        values |= {name: str(Path(path).resolve()) for name, path in paths.items()}
        values["rows"] = whole_windows(arguments.rows, arguments.block_size)
        values["test_rows"] = whole_windows(arguments.rows // 3, arguments.block_size)
        return cls(**values)

    def record(self) -> dict[str, Any]:
        """The setting without paths of this machine."""
        names = {name: Path(getattr(self, name)).name for name in ("model", "text")}
        return {name: value for name, value in vars(self).items() if name != "output_dir"} | names

    @property
    def folder(self) -> Path:
        """Folder of the stages' files."""
        elsewhere = ("output_dir", "device", "repeats")
        settings = {name: value for name, value in vars(self).items() if name not in elsewhere}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
        return Path(self.output_dir) / "work" / digest

    def chain_folder(self, precision: str = "no") -> Path:
        """Folder of the chain's files in a precision."""
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

    def memory(self, *, tied: bool = False, dtype: str = "float32") -> Any:
        """A memory with random weights, on which time and memory do not depend; `tied`: to the base's head."""
        import torch
        from transformers import AutoConfig

        from models import memory_class
        from models.stack import memory_config, vocabulary_size
        from utils.loading import load_tokenizer

        config = memory_config(AutoConfig.from_pretrained(self.model), self.memory_layers)
        config.vocab_size = vocabulary_size(load_tokenizer(self.model, required=True))
        config.tie_head = "base" if tied else None
        torch.manual_seed(0)
        return memory_class(config)(config).to(self.device, getattr(torch, dtype)).eval()

    def step(self, step: str, precision: str = "no", **changes: object) -> list[str]:
        """Module and flags of one stage of the chain. A changed flag comes twice; the last one counts."""
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

    def run_step(self, step: str, precision: str = "no") -> float:
        """Run one stage of the chain; returns its seconds. Raises InputError if it fails."""
        seconds = self.run("-m", *self.step(step, precision))
        (self.chain_folder(precision) / f"{step}.done").touch()
        return seconds

    def prepare(self, last: str) -> None:
        """Make the windows and the float32 files of the stages up to `last`, where they are missing."""
        self.windows()
        for step in [*STEPS][: [*STEPS].index(last) + 1]:
            if not (self.chain_folder() / f"{step}.done").exists():
                self.run_step(step)

    def run(self, *command: object, watch: Callable[[int], None] | None = None) -> float:
        """Run `python …` in the repository's root, on the setting's device; returns its seconds.

        `watch` is called with the process's id until it ends. Raises InputError with the last line of a failed process.
        """
        hidden = {} if self.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        environment = {**os.environ, **hidden, "TOKENIZERS_PARALLELISM": "false"}
        with tempfile.TemporaryFile("w+") as errors:
            start = time.perf_counter()
            words = [sys.executable, *map(str, command)]
            process = subprocess.Popen(
                words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors
            )
            while watch and process.poll() is None:
                watch(process.pid)
                time.sleep(SAMPLE_SECONDS)
            status, seconds = process.wait(), time.perf_counter() - start
            if status:
                errors.seek(0)
                lines = [line for line in errors if line.strip()] or [f"exit status {status}"]
                raise InputError(f"{command[1]}: failed, {one_line(lines[-1], 400)}")
        return seconds

    def watched(self, *command: str) -> dict[str, float]:
        """Run a module with flags: its seconds, and its peak of anonymous memory (not mapped from files)."""
        peak = 0

        def watch(process: int) -> None:
            nonlocal peak
            with contextlib.suppress(OSError):  # not on Linux, or the process has just ended
                lines = Path(f"/proc/{process}/status").read_text().splitlines()
                peak = max(peak, *(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)

        return {"seconds": self.run("-m", *command, watch=watch), "peak_bytes": peak}


def whole_windows(rows: int, block_size: int) -> int:
    """The nearest number of rows that whole overlapping windows have: a multiple of `block_size` less one."""
    return max(round((rows + 1) / block_size), 1) * block_size - 1


def make_windows(setting: Setting) -> None:
    """Write the windows folder with splits train and test, of exactly as many tokens as the rows need."""
    import datasets
    import numpy as np

    from utils.files import atomic
    from utils.loading import load_tokenizer

    wanted = setting.rows + 1 + setting.test_rows + 1
    text = Path(setting.text).read_text(encoding="utf-8")
    if setting.text.endswith(".jsonl"):
        text = "".join(json.loads(line)["text"] for line in text.split("\n")[:-1])
    # A token has about four characters.
    found = load_tokenizer(setting.model, required=True)(text[: 8 * wanted], verbose=False)["input_ids"][:wanted]
    if len(found) < wanted:
        raise InputError(f"--text {setting.text}: has {len(found)} tokens, {wanted} are needed; lower --rows")
    train, test = np.split(np.asarray(found, dtype=np.int32), [setting.rows + 1])
    splits = {}
    for split, tokens in (("train", train), ("test", test)):
        rows, first = [], 0
        for start in range(0, len(tokens), setting.stride):
            end, begin = min(start + setting.stride, len(tokens)), max(start + setting.stride - setting.block_size, 0)
            ids = np.zeros(setting.block_size, dtype=np.int32)  # padded on the right
            ids[: end - begin] = tokens[begin:end]
            labels = np.full(setting.block_size, -100, dtype=np.int32)
            labels[start - begin : end - begin] = tokens[start:end]
            last = first + int((labels[1:] != -100).sum())
            rows.append({"input_ids": ids, "labels": labels, "attention_mask": np.ones_like(ids, dtype=np.int8)})
            rows[-1]["dstore_range"], first = [first, last], last
        splits[split] = datasets.Dataset.from_list(rows)
    with atomic(setting.folder / "windows") as folder:
        datasets.DatasetDict(splits).save_to_disk(str(folder))
