"""Index files and their records from outside, with any damage: hits of the index's own rows, or one line."""

from __future__ import annotations

import copy
import json
import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from knn_utils.faiss_files import find_index, read_record, record_path
from knn_utils.search import KNNSearcher
from utils.errors import InputError

ROWS, DIM, K = 600, 16, 5
FACTORIES = ("Flat", "IVF4,Flat", "IVF4,PQ4x4", "OPQ4,IVF4,PQ4x4", "HNSW8,Flat")
BATCH, BATCHES = 20, 6
SPARE_BYTES = 4 << 30
MANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6)
JSON |= st.lists(st.integers(), max_size=2) | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(scope="module")
def contents(tmp_path_factory) -> dict[str, bytes]:
    keys = np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)
    folder, found = tmp_path_factory.mktemp("faiss"), {}
    for factory in FACTORIES:
        index = faiss.index_factory(DIM, factory)
        index.train(keys)
        index.add(keys)
        faiss.write_index(index, str(folder / "a.index"))
        found[factory] = (folder / "a.index").read_bytes()
    return found


def in_child(work: Callable[[], None]) -> str:
    """Run `work` in a forked process with little memory and time; what went wrong there, or ''."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        problem = "ended early"
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_BYTES, used + SPARE_BYTES))
            resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
            work()
            problem = ""
        except BaseException as error:
            problem = f"{type(error).__name__}: {error}"
        finally:
            os.write(writer, problem.encode()[:4000])
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        problem = pipe.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return problem or ("" if status == 0 else f"signal {-status}")


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """`content` with numbers, bytes or bits changed, mostly where its lengths are, or cut off."""
    data = bytearray(content)
    for _ in range(random.integers(1, 4)):
        place = int(random.integers(0, len(data) if random.random() < 0.5 else min(len(data), 300)))
        kind = random.integers(0, 6)
        if kind == 0:
            data[place] = int(random.integers(0, 256))
        elif kind == 1:
            data[place] ^= 1 << int(random.integers(0, 8))
        elif kind == 2:
            data[place & ~3 : (place & ~3) + 4] = struct.pack("<i", random.choice([0, 1, -1, 8, 1000, 2**31 - 1]))
        elif kind == 3:
            number = int(random.choice([0, 1, -1, 3, 1000, 1 << 33, 1 << 40, 1 << 62]))
            data[place & ~7 : (place & ~7) + 8] = struct.pack("<q", number)
        elif kind == 4:
            del data[max(place, 1) :]
        else:
            del data[place : place + int(random.integers(1, 17))]
        if not data:
            return b"\0"
    return bytes(data)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("number", range(BATCHES))
def test_any_damage_to_an_index_gives_hits_or_one_line(tmp_path, contents, factory, number):
    queries = np.random.default_rng(1).standard_normal((3, DIM)).astype(np.float16)
    random = np.random.default_rng((number, len(factory)))
    versions = [damaged(contents[factory], random) for _ in range(BATCH)]
    path = tmp_path / "a.index"

    def work() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        for version in versions:
            path.write_bytes(version)
            try:
                searcher = KNNSearcher(path, probe=4)
                distances, ids = searcher.search(queries, K)
                assert distances.shape == ids.shape == (3, K)
                assert ids.min() >= -1 and ids.max() < searcher.rows
            except InputError as error:
                assert "\n" not in str(error)

    assert in_child(work) == ""


def test_lists_that_do_not_fit_the_index_are_one_line(tmp_path, contents):
    """FAISS finds some contradictions only when it searches."""
    content, lines = contents["IVF4,Flat"], []
    path = tmp_path / "a.index"
    for place in range(0, 300, 4):
        data = bytearray(content)
        data[place : place + 4] = struct.pack("<i", 3)
        path.write_bytes(data)

        def work() -> None:
            try:
                KNNSearcher(path, probe=4).search(np.zeros((1, DIM), np.float16), K)
            except InputError as error:
                assert "\n" not in str(error)

        lines.append(in_child(work))
    assert set(lines) == {""}


def recorded(folder: Path, contents: dict[str, bytes]) -> tuple[Path, dict[str, Any]]:
    """An index of two files with its record."""
    folder.mkdir(exist_ok=True)
    shards = []
    for number in range(2):
        (folder / f"shard-{number:05d}.index").write_bytes(contents["Flat"])
        size = len(contents["Flat"])
        shard = {"file": f"shard-{number:05d}.index", "first_row": number * ROWS, "rows": ROWS, "bytes": size}
        shards.append(shard | {"sha256": f"{number:064x}"})
    record = {"format": "mlpmemory-index", "format_version": 1, "rows": 2 * ROWS, "dim": DIM, "factory": "Flat"}
    record |= {"settings": {}, "datastore": {}, "shards": shards}
    record_path(folder).write_text(json.dumps(record))
    return folder, record


@MANY
@given(
    keys=st.sampled_from(
        [(name,) for name in ("format", "format_version", "rows", "dim", "settings", "datastore", "shards")]
        + [("shards", 1), ("shards", 0)]
        + [("shards", 1, name) for name in ("file", "first_row", "rows", "bytes", "sha256")]
    ),
    value=JSON,
)
def test_any_change_to_a_record_gives_the_index_or_one_line(tmp_path, contents, keys: tuple, value: Any):
    folder, record = recorded(tmp_path / "a.index", contents)
    changed = copy.deepcopy(record)
    *way, last = keys
    place: Any = changed
    for key in way:
        place = place[key]
    place[last] = value
    record_path(folder).write_text(json.dumps(changed))
    try:
        read = read_record(folder)
        assert sum(shard["rows"] for shard in read["shards"]) == read["rows"]
        files = find_index(folder)
        assert all(shard.path.parent == folder for shard in files.shards)
        assert KNNSearcher(folder, probe=1).rows == read["rows"]
    except InputError as error:
        assert str(folder) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("name", ["../b.index", "/etc/b.index", "a/../../b.index", "b\0.index", "", ".", "b.index/", 3])
def test_a_shard_name_that_leaves_the_folder_is_refused(tmp_path, contents, name):
    folder, record = recorded(tmp_path / "a.index", contents)
    record["shards"][1]["file"] = name
    record_path(folder).write_text(json.dumps(record))
    with pytest.raises(InputError, match="plain name"):
        find_index(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, "\0", '"x"', "{}", "null", '{"format": "mlpmemory-index"}'])
def test_a_file_that_is_no_record_is_refused(tmp_path, contents, text):
    folder, _ = recorded(tmp_path / "a.index", contents)
    record_path(folder).write_text(text)
    with pytest.raises(InputError):
        find_index(folder)
