"""Any task of EleutherAI's evaluation harness, on a base model or a base with its MLP memory.

    python -m downstream.lm_eval_mlpmem --tasks mlpmem_general --model_name_or_path BASE \\
        --use_neural_knn --knn_generator_path MEMORY --lmbda 0.5 --with_base --output_dir results/general

Tasks and groups of the harness go by its names; `mlpmem_general` is the group of the paper's nine general tasks, and
`--include_path` adds a folder of task files. With `--with_base` the base alone is scored in the same run. It needs the
package lm-eval.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from downstream.model import ModelArguments
from utils.cli import flag, parse, required
from utils.errors import InputError, command, one_line

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
        for name in ("limit", "per_device_eval_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} {value}: expected a number above 0")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise InputError(f"--num_fewshot {self.num_fewshot}: expected a number from 0")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise InputError(f"--include_path {self.include_path}: no such folder")


def main() -> None:
    harness, model = parse(HarnessArguments, ModelArguments, description=__doc__.split("\n")[0])
    harness.check()
    model.check()
    if harness.with_base and not model.use_neural_knn:
        raise InputError("--with_base: needs --use_neural_knn; without it the base alone is scored already")
    started = time.time()
    try:
        import lm_eval
    except ImportError:
        raise InputError("the evaluation harness is not installed; pip install lm-eval") from None
    from lm_eval.tasks import TaskManager

    from downstream.lm_eval_model import MLPMemoryLM
    from utils.evaluation import write_results
    from utils.files import ensure_folder

    names = [name for entry in harness.tasks for name in entry.split(",") if name]
    folders = [path for path in (str(OWN_TASKS), harness.include_path) if path]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not set(names) <= set(manager.all_subtasks):
        # The harness's thousands of task files take seconds to read, and are read only when one may be meant.
        manager = TaskManager(include_path=folders)
    check_names(names, manager)
    ensure_folder(harness.output_dir)
    given = vars(model).copy()
    use_memory, memory = given.pop("use_neural_knn"), given.pop("knn_generator_path")
    memory = memory if use_memory else None
    language_model = MLPMemoryLM(
        given.pop("model_name_or_path"), memory, batch_size=harness.per_device_eval_batch_size, **given
    )
    base = None
    if harness.with_base:
        # At lambda 0 the joint model computes the base alone and runs no memory.
        language_model.model.lmbda = 0.0
        found = evaluate(language_model, names, manager, harness)
        base = {"tasks": found["tasks"], "groups": found["groups"]}
        language_model.model.lmbda = model.lmbda
    results = {
        **evaluate(language_model, names, manager, harness),
        **({"base": base} if base else {}),
        "model": model.model_name_or_path,
        "memory": memory,
        "lmbda": model.lmbda if memory else None,
        "knn_temp": model.knn_temp if memory else None,
        "settings": {
            "num_fewshot": harness.num_fewshot,
            "limit": harness.limit,
            "seed": harness.seed,
            "lm_eval": lm_eval.__version__,
            **model.settings(),
        },
    }
    write_results(harness.output_dir, results, started)
    if base:
        print(table("base", base["tasks"]))
    print(table(f"base + memory (lambda {model.lmbda:g})" if memory else "base", results["tasks"]))


def evaluate(language_model: Any, names: Sequence[str], manager: Any, harness: HarnessArguments) -> dict[str, Any]:
    """Scores of the chosen tasks, as the model stands now. Raises InputError where a dataset cannot be had."""
    import lm_eval

    try:
        found = lm_eval.simple_evaluate(
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
    except InputError:
        raise
    except Exception as error:
        if is_about_data(error):
            raise InputError(
                f"--tasks {' '.join(names)}: a task's dataset cannot be loaded ({one_line(error, 240)})"
            ) from None
        raise
    return {
        "tasks": plain(found["results"]),
        "groups": plain(found.get("groups", {})),
        "task_versions": plain(found.get("versions", {})),
        "counts": plain(found.get("n-samples", {})),
    }


def check_names(names: Sequence[str], manager: Any) -> None:
    """Every name has to be a task, group, tag or pattern that the harness knows. Raises InputError."""
    if not names:
        raise InputError("--tasks: expected at least one name")
    for name in names:
        if not manager.match_tasks([name]):
            own = ", ".join(sorted(each for each in manager.all_tasks if each.startswith("mlpmem_")))
            raise InputError(
                f"--tasks {name}: unknown; expected one of {own}, or one of the harness's {len(manager.all_tasks)} "
                "(lm-eval ls tasks lists them)"
            )


def is_about_data(error: BaseException) -> bool:
    """Whether an exception of the harness comes from fetching or reading a dataset."""
    home = type(error).__module__.split(".")[0]
    return home in ("datasets", "huggingface_hub", "httpx", "requests", "fsspec") or isinstance(
        error, (FileNotFoundError, ConnectionError)
    )


def plain(value: Any) -> Any:
    """JSON values only: NumPy numbers become Python's, what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else None


def table(which: str, tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """The model's name, and one line for each task: its metrics with their standard errors."""
    lines = [which]
    for task, scores in tasks.items():
        shown = []
        for name, value in scores.items():
            metric, _, kind = name.partition(",")
            if not isinstance(value, float) or metric.endswith("_stderr"):
                continue
            error = scores.get(f"{metric}_stderr,{kind}")
            shown.append(f"{metric} {value:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else ""))
        lines.append(f"  {task}: {', '.join(shown) or 'no score'}")
    return "\n".join(lines)


if __name__ == "__main__":
    command(main)()
