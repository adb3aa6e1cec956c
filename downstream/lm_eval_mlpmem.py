"""Base and joint model on any task of EleutherAI's evaluation harness, in one run.

    python -m downstream.lm_eval_mlpmem --tasks mlpmem_general --model_name_or_path BASE \\
        --use_neural_knn --knn_generator_path MEMORY --lmbda 0.5 --with_base --output_dir results/general

The harness itself opens a folder of `python -m models.export` (`lm_eval --model hf --model_args
pretrained=FOLDER,trust_remote_code=True`, to which `lmbda=…` may be added) and gives the same figures. What it cannot do
is here: a base and a memory that are two folders, scored with and without the memory while both are loaded once, and the
paper's general tasks by name. Tasks and groups go by the harness's names; `mlpmem_general` is the group of the paper's
nine, and `--include_path` adds a folder of task files. It needs the package lm-eval.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from downstream.model import ModelArguments
from utils.cli import command, flag, parse, required, started_together
from utils.errors import InputError, check_at_least, check_seed, one_line
from utils.results import lambda_text

OWN_TASKS = Path(__file__).resolve().parent / "general_tasks"


@dataclass
class HarnessArguments:
    """Which tasks, and where the scores go."""

    output_dir: str = required("folder of results.json")
    tasks: list[str] = flag(["mlpmem_general"], "names of tasks, groups and tags, with spaces or commas between them")
    include_path: str | None = flag(None, "a folder of further task files (YAML)")
    num_fewshot: int | None = flag(None, "demonstrations before each question; default: the task's own")
    limit: int | None = flag(None, "take so many rows of each task at most")
    with_base: bool = flag(False, "score the base alone too, in the same run (with --use_neural_knn)")
    per_device_eval_batch_size: int = flag(8, "sequences in one forward pass")
    seed: int = flag(42, "for the choice of demonstrations")

    def check(self) -> None:
        """Check the values by themselves. Raises InputError."""
        check_at_least(1, self, "limit", "per_device_eval_batch_size")
        check_at_least(0, self, "num_fewshot")
        check_seed("--seed", self.seed)
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise InputError(f"--include_path {self.include_path}: no such folder")


def main() -> None:
    harness, model = parse(HarnessArguments, ModelArguments, description=__doc__.split("\n")[0])
    harness.check()
    model.check()
    if harness.with_base and not model.use_neural_knn:
        raise InputError("--with_base: needs --use_neural_knn; without it the base alone is scored already")
    if started_together():
        raise InputError("the harness runs as one process here; start it with python -m, not accelerate launch")
    started = time.time()
    try:
        import lm_eval
    except ImportError:
        raise InputError("the evaluation harness is not installed; pip install lm-eval") from None
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from downstream.model import open_model
    from utils.files import ensure_folder
    from utils.results import write_results

    names = [name for entry in harness.tasks for name in entry.split(",") if name]
    folders = [path for path in (str(OWN_TASKS), harness.include_path) if path]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):
        # The harness's thousands of task files take seconds to read, and are read only when one may be meant.
        manager = TaskManager(include_path=folders)
    for name in names:
        if not manager.match_tasks([name]):
            own = ", ".join(sorted(each for each in manager.all_tasks if each.startswith("mlpmem_")))
            raise InputError(f"--tasks {name}: unknown; expected one of {own}, or one that lm-eval ls tasks lists")
    ensure_folder(harness.output_dir)
    opened, tokenizer = open_model(model)
    sizes = {"batch_size": harness.per_device_eval_batch_size, "max_batch_size": 64}
    language_model = HFLM(
        pretrained=opened, tokenizer=tokenizer, backend="causal", add_bos_token=model.add_bos, **sizes
    )
    scored = {}
    if harness.with_base:
        # At lambda 0 the joint model computes the base alone and runs no memory.
        opened.lmbda = 0.0
        scored["base"] = evaluate(language_model, names, manager, harness)
        opened.lmbda = model.lmbda
    which = f"base + memory (lambda {lambda_text(model.lmbda)})" if model.use_neural_knn else "base"
    scored[which] = evaluate(language_model, names, manager, harness)
    results = {**plain(scored[which]), **model.stated()}
    if harness.with_base:
        results["base"] = plain(scored["base"])
    chosen = {name: getattr(harness, name) for name in ("num_fewshot", "limit", "seed")}
    results["settings"] = {**chosen, "lm_eval": lm_eval.__version__, **model.settings()}
    write_results(harness.output_dir, results, started)
    for name, found in scored.items():
        print(f"{name}\n{make_table(found)}")


def evaluate(language_model: Any, names: Sequence[str], manager: Any, harness: HarnessArguments) -> dict[str, Any]:
    """What the harness finds, as the model stands now. Raises InputError where a dataset cannot be had."""
    import lm_eval

    try:
        return lm_eval.simple_evaluate(
            model=language_model,
            tasks=list(names),
            task_manager=manager,
            num_fewshot=harness.num_fewshot,
            limit=harness.limit,
            log_samples=False,
            bootstrap_iters=1000,
            random_seed=harness.seed,
            fewshot_random_seed=harness.seed,
        )
    except Exception as error:
        package = type(error).__module__.split(".")[0]
        if package in ("datasets", "huggingface_hub", "httpx", "requests", "fsspec") or isinstance(error, OSError):
            raise InputError(
                f"--tasks {' '.join(names)}: a task's dataset cannot be loaded ({one_line(error, 240)})"
            ) from None
        raise


def plain(found: Mapping[str, Any]) -> dict[str, Any]:
    """The harness's scores, versions and counts as JSON values: what is not finite becomes null."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(name): finite(each) for name, each in value.items()}
        if isinstance(value, (str, int)) or value is None:
            return value
        return float(value) if math.isfinite(value) else None

    names = {"tasks": "results", "groups": "groups", "task_versions": "versions", "counts": "n-samples"}
    return {name: finite(found.get(own, {})) for name, own in names.items()}


if __name__ == "__main__":
    command(main)()
