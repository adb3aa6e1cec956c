"""The setting that everything is measured at: model, text, sizes; and the files of each stage, made when missing.

The windows hold exactly the asked number of datastore rows: tokens are counted, not documents. Files are made by the
project's own commands, in a folder named by what determines them.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from utils.errors import InputError, one_line

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = Path("dataset/embedded")
STEPS = ("embed", "index", "targets", "train", "joint")


@dataclass
class Setting:
    """What is measured, and where its files are.

    Attributes:
        model, text: folder of the base model; a text file.
        rows: datastore rows of the training windows, one less than a multiple of `block_size`.
        test_rows: the same of the windows that joint evaluation scores.
        block_size, stride: of the windows; 1,024 and 512 are the original's.
        memory_layers, k, probe, ncentroids, code_size: of the memory and the index.
        repeats: timed rounds.
        work: folder of the files.
    """

    model: str
    text: str
    rows: int
    test_rows: int
    block_size: int
    stride: int
    memory_layers: int
    k: int
    probe: int
    ncentroids: int
    code_size: int
    device: str
    repeats: int
    work: str

    # -- folders ----------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        return Path(self.work)

    @property
    def windows_path(self) -> Path:
        return self.folder / "windows"

    def chain_folder(self, precision: str = "no") -> Path:
        """Where the chain's files of a precision are ("no": float32, "bf16")."""
        return self.folder / {"no": "float32", "bf16": "bfloat16"}[precision]

    @property
    def dstore_path(self) -> Path:
        return next((self.chain_folder() / "dstore").glob("dstore_*_train_*.arrow"))

    @property
    def index_path(self) -> Path:
        return self.chain_folder() / "train.index"

    @property
    def values_path(self) -> Path:
        return self.chain_folder() / "train_vals.npy"

    @property
    def targets_path(self) -> Path:
        return self.chain_folder() / "targets"

    # -- what is opened ---------------------------------------------------------------------------------

    def windows(self, split: str = "train") -> Any:
        from utils.loading import load_windows

        make_windows(self)
        return load_windows(self.windows_path, split)

    def base(self, dtype: str = "float32") -> Any:
        from utils.base_model import load_base, load_tokenizer
        from utils.loading import quiet_libraries, resolve_dtype

        quiet_libraries()
        base = load_base(
            self.model, tokenizer=load_tokenizer(self.model), dtype=resolve_dtype(dtype), device=self.device
        )
        return base.requires_grad_(False)

    def memory(self, dtype: str = "float32") -> Any:
        """A memory with random weights: time and memory do not depend on their values."""
        import torch

        from models import memory_class
        from utils.loading import resolve_dtype

        torch.manual_seed(0)
        config = self.memory_config()
        return memory_class(config)(config).to(self.device, resolve_dtype(dtype)).eval()

    def memory_config(self) -> Any:
        from transformers import AutoConfig

        from models.stack import memory_config
        from utils.base_model import load_tokenizer

        config = memory_config(AutoConfig.from_pretrained(self.model), self.memory_layers)
        tokenizer = load_tokenizer(self.model)
        config.vocab_size = config.vocab_size if tokenizer is None else len(tokenizer)
        return config

    # -- commands ---------------------------------------------------------------------------------------

    def step_command(self, step: str, precision: str = "no") -> list[str]:
        """Module and flags of one stage of the chain."""
        folder = self.chain_folder(precision)
        dtype = folder.name
        dstore = next((folder / "dstore").glob("dstore_*_train_*.arrow"), folder / "dstore")
        common = {"model_name_or_path": self.model, "dataset_name": self.windows_path, "report_to": "none"}
        windows_per_step = max(2048 // self.stride, 1)
        flags: dict[str, dict[str, Any]] = {
            "embed": common
            | {"do_eval": True, "eval_subset": "train", "per_device_eval_batch_size": 4, "torch_dtype": dtype}
            | {"save_knnlm_dstore": True, "dstore_dir": folder / "dstore", "output_dir": folder / "embed"},
            "index": {"dstore_path": dstore, "index_path": folder / "train.index", "probe": self.probe}
            | {"ncentroids": self.ncentroids, "code_size": self.code_size},
            "targets": {"dstore_path": dstore, "index_path": folder / "train.index", "k": self.k, "knn_temp": 16}
            | {"probe": self.probe, "ignore_first": True, "output_path": folder / "targets"},
            "train": common
            | {"knn_save_path": folder / "targets", "knn_dstore_path": dstore, "output_dir": folder / "memory"}
            | {"memory_layers": self.memory_layers, "num_train_epochs": 2, "learning_rate": 5e-4, "seed": 0}
            | {"per_device_train_batch_size": windows_per_step, "validation_split_name": "none"}
            | {"mixed_precision": precision},
            "joint": common
            | {"do_test": True, "dataset_split_name": "test", "knn_generator_path": folder / "memory" / "epoch_2"}
            | {"per_device_eval_batch_size": 4, "torch_dtype": dtype, "output_dir": folder / "joint"},
        }
        modules = {"embed": "train_base", "index": "knn_utils.build_index", "targets": "knn_utils.saveKNNMulti"}
        modules |= {"train": "train_mlpmem_offline", "joint": "evaluate_joint"}
        pairs = ((f"--{name}", str(value)) for name, value in flags[step].items())
        return [modules[step], *(word for pair in pairs for word in pair)]

    def environment(self) -> dict[str, str]:
        hidden = {} if self.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        return {**os.environ, **hidden, "TOKENIZERS_PARALLELISM": "false"}

    def run(self, *command: object) -> float:
        """Run `python …` from the repository's root; returns its seconds. Raises InputError when it fails."""
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=self.environment(),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            raise InputError(f"{' '.join(map(str, command[:3]))}: failed, {one_line(done.stderr[-500:])}")
        return time.perf_counter() - start

    def run_step(self, step: str, precision: str = "no") -> float:
        return self.run("-m", *self.step_command(step, precision))

    def watched(self, module: str, *flags: object) -> dict[str, float]:
        """Run a command in a process of its own: its seconds, and its peak of anonymous memory in bytes."""
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "memory.json"
            self.run("-m", "benchmarks.memory", result, module, *flags)
            return json.loads(result.read_text())

    def prepare(self, upto: str) -> Setting:
        """Make the windows and the float32 files of the stages up to `upto`, where they are missing."""
        make_windows(self)
        for step in STEPS[: STEPS.index(upto) + 1]:
            # Complete outputs are recognised by the commands themselves; the mark spares starting them.
            mark = self.chain_folder() / f"{step}.done"
            if not mark.exists():
                self.run_step(step)
                mark.touch()
        return self


def make_setting(arguments: Any, output_dir: Path) -> Setting:
    """The setting that the flags ask for; fetches the embedded model and text where none are named."""
    model, text = arguments.model, arguments.text
    if model is None or text is None:
        if not (EMBEDDED / "model" / "config.json").exists() or not (EMBEDDED / "wiki.txt").exists():
            subprocess.run([sys.executable, "-m", "utils.embedded_default", "--output_dir", EMBEDDED], check=True)
        model, text = model or EMBEDDED / "model", text or EMBEDDED / "wiki.txt"
    for name, path in (("--model", model), ("--text", text)):
        if not Path(path).exists():
            raise InputError(f"{name} {path}: no such file or folder")
    names = set(Setting.__dataclass_fields__) - {"model", "text", "test_rows", "work"}
    values: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    values |= {"model": str(Path(model).resolve()), "text": str(Path(text).resolve())}
    values["rows"] = whole_windows(arguments.rows, arguments.block_size)
    values["test_rows"] = whole_windows(max(arguments.rows // 3, arguments.block_size), arguments.block_size)
    identity = {name: value for name, value in values.items() if name not in ("repeats", "device")}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]
    return Setting(**values, work=str((output_dir / "work" / digest).resolve()))


def whole_windows(rows: int, block_size: int) -> int:
    """The nearest number of rows that whole windows of overlapping text have: a multiple of `block_size` less one."""
    return max(round((rows + 1) / block_size), 1) * block_size - 1


def read_setting(path: Path) -> Setting:
    return Setting(**json.loads(path.read_text()))


def record(setting: Setting) -> dict[str, Any]:
    """The setting without the machine's paths."""
    values = asdict(setting)
    for name in ("model", "text"):
        values[name] = Path(values[name]).name
    del values["work"]
    return values


def make_windows(setting: Setting) -> None:
    """Write the windows folder: train, test, exactly as many tokens as the rows ask for."""
    if setting.windows_path.exists():
        return
    import datasets
    import numpy as np

    from utils.base_model import load_tokenizer
    from utils.files import atomic_folder
    from utils.windows import WindowSizes, windows_of_split

    tokenizer = load_tokenizer(setting.model, required=True)
    wanted = setting.rows + 1 + setting.test_rows + 1
    text = Path(setting.text).read_text(encoding="utf-8")
    ids: list[int] = []
    # A token has about four characters; no more of the text is tokenized than is needed.
    for start in range(0, len(text), 1 << 18):
        ids += tokenizer(text[start : start + (1 << 18)], verbose=False)["input_ids"]
        if len(ids) >= wanted:
            break
    if len(ids) < wanted:
        raise InputError(f"--text {setting.text}: has {len(ids)} tokens, {wanted} are needed; ask for fewer --rows")
    tokens = np.asarray(ids[:wanted], dtype=np.int32)
    pieces = {"train": tokens[: setting.rows + 1], "test": tokens[setting.rows + 1 :]}
    sizes = WindowSizes(setting.block_size, setting.stride)
    splits = {}
    with tempfile.TemporaryDirectory() as work:
        for split, piece in pieces.items():
            counted = _Counted(tokenizer, piece)
            folder = Path(work) / split
            folder.mkdir()
            splits[split], _ = windows_of_split(datasets.Dataset.from_dict({"text": [""]}), counted, sizes, 1, folder)
        with atomic_folder(setting.windows_path) as folder:
            datasets.DatasetDict(splits).save_to_disk(str(folder))


class _Counted(SimpleNamespace):
    """Stands for a tokenizer whose one text has exactly these tokens."""

    def __init__(self, tokenizer: Any, tokens: Any) -> None:
        super().__init__(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, tokens=tokens)

    def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
        return {"input_ids": [self.tokens]}
