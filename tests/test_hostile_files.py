"""Files from outside that are damaged or made to harm: refused in one line, or read as what they truly hold."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from knn_utils.datastore import (
    Datastore,
    KNNTargets,
    TargetRows,
    datastore_batch,
    datastore_schema,
    load_values,
    targets_batch,
)
from knn_utils.manifest import read_manifest
from knn_utils.parts import PartedOutput, write_single_file
from utils.errors import InputError

ROWS, DIM = 12, 3
ANY_BYTES = settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning", "ignore::RuntimeWarning")


def key_batch(start: int, stop: int) -> pa.RecordBatch:
    numbers = np.arange(start, stop)
    keys = (numbers[:, None] + np.arange(DIM)).astype(np.float16)
    return datastore_batch(keys, numbers.astype(np.int32), numbers.astype(np.float32))


def target_batch(start: int, stop: int) -> pa.RecordBatch:
    counts = (np.arange(start, stop) % 4).astype(np.int32)
    entries = int(counts.sum())
    tokens, probs = np.arange(entries, dtype=np.int32), np.full(entries, 0.5, np.float16)
    numbers = np.arange(start, stop)
    return targets_batch(TargetRows(counts, tokens, probs, numbers.astype(np.int32), numbers.astype(np.float32)))


def loose(columns: dict[str, pa.Array]) -> list[pa.RecordBatch]:
    batch = pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
    return [batch.slice(0, 5), batch.slice(5)]


def stream_bytes(batches: list[pa.RecordBatch], **options: Any) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batches[0].schema, options=pa.ipc.IpcWriteOptions(**options)) as stream:
        for batch in batches:
            stream.write_batch(batch)
    return sink.getvalue()


KEY_LISTS = pa.array(list(np.arange(ROWS * DIM, dtype=np.float16).reshape(ROWS, DIM)), pa.list_(pa.float16()))
TOKEN_LISTS = [list(range(row % 4)) for row in range(ROWS)]
FILES: dict[str, tuple[type, bytes]] = {
    "datastore": (Datastore, stream_bytes([key_batch(0, 5), key_batch(5, ROWS)])),
    "datastore of lists": (
        Datastore,
        stream_bytes(
            loose({"keys": KEY_LISTS, "vals": pa.array([[row] for row in range(ROWS)], pa.list_(pa.int64(), 1))})
        ),
    ),
    "targets": (KNNTargets, stream_bytes([target_batch(0, 5), target_batch(5, ROWS)])),
    "targets of large lists": (
        KNNTargets,
        stream_bytes(
            loose(
                {
                    "id_cnt": pa.array([len(row) for row in TOKEN_LISTS], pa.int64()),
                    "token_id": pa.array(TOKEN_LISTS, pa.large_list(pa.int64())),
                    "prob": pa.array([[0.5] * len(row) for row in TOKEN_LISTS], pa.large_list(pa.float32())),
                    "label": pa.array(range(ROWS), pa.int32()),
                }
            )
        ),
    ),
}


def read_all(path: Path, kind: type) -> str:
    """Read every row in all ways, checking types and lengths; returns the refusal, or '' where all was read."""
    try:
        if kind is Datastore:
            store = Datastore.open(path)
            keys, vals, logprob = store.keys(), store.vals(), store.logprob()
            assert keys.dtype == np.float16 and keys.shape == (store.rows, store.dim)
            assert vals.dtype == np.int32 and vals.shape == (store.rows,)
            assert logprob is None or (logprob.dtype == np.float32 and logprob.shape == (store.rows,))
            assert np.array_equal(store.gather_keys(np.array([store.rows - 1])), keys[-1:], equal_nan=True)
            return ""
        targets = KNNTargets.open(path)
        rows = targets.read(0)
        assert [rows.id_cnt.dtype, rows.token_id.dtype, rows.prob.dtype] == [np.int32, np.int32, np.float16]
        assert len(rows.id_cnt) == len(rows.label) == targets.rows and rows.id_cnt.min() >= 0
        assert rows.id_cnt.sum(dtype=np.int64) == len(rows.token_id) == len(rows.prob)
        assert np.array_equal(targets.labels(), rows.label)
        # touch the memory that the views claim
        assert all(np.asarray(part).sum() is not None for part in (rows.token_id, rows.prob, rows.label))
        return ""
    except InputError as error:
        assert str(path.parent) in str(error)
        return str(error)


def test_the_undamaged_files_are_read(tmp_path: Path) -> None:
    for kind, content in FILES.values():
        (tmp_path / "f.arrow").write_bytes(content)
        assert read_all(tmp_path / "f.arrow", kind) == ""


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with a few bytes, bits or words changed, a piece copied over another, or the end cut off."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data) - 1))
        match draw(st.sampled_from(["byte", "bit", "word", "long", "copy", "cut", "drop"])):
            case "byte":
                data[place] = draw(st.integers(0, 255))
            case "bit":
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "word":
                word = draw(st.sampled_from([0, 1, -1, 8, 255, 0x7FFFFFFF, -0x80000000, 0x40000000]))
                data[place & ~3 : (place & ~3) + 4] = struct.pack("<i", word)
            case "long":
                word = draw(st.sampled_from([0, 1, -1, 1 << 33, 1 << 40, 1 << 62, -1 << 63]))
                data[place & ~7 : (place & ~7) + 8] = struct.pack("<q", word)
            case "copy":
                source, length = draw(st.integers(0, len(data) - 1)), draw(st.integers(1, 40))
                data[place : place + length] = data[source : source + length]
            case "cut":
                del data[max(place, 1) :]
            case "drop":
                del data[place : place + draw(st.integers(1, 16))]
        if not data:
            return b"\0"
    return bytes(data)


@pytest.mark.parametrize("name", FILES)
@ANY_BYTES
@given(data=st.data())
def test_any_damage_gives_typed_rows_or_one_line(tmp_path: Path, name: str, data: st.DataObject) -> None:
    kind, content = FILES[name]
    path = tmp_path / "f.arrow"
    path.write_bytes(data.draw(damaged(content)))
    assert "\n" not in read_all(path, kind)[:-1].replace("\n", " ")


def in_child_with_little_memory(work: Callable[[], None], spare: int = 300_000_000) -> None:
    """Run `work` in a forked process that may take `spare` bytes of address space more than it has."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + spare, used + spare))
            work()
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("name", FILES)
def test_no_absurd_number_anywhere_in_a_file_takes_memory(tmp_path: Path, name: str) -> None:
    kind, content = FILES[name]

    def work() -> None:
        for form, number in (("<i", 0x7FFFFFF0), ("<q", 1 << 33), ("<q", 1 << 45), ("<q", -1)):
            size = struct.calcsize(form)
            for place in range(0, len(content) - size + 1, 4):
                data = bytearray(content)
                data[place : place + size] = struct.pack(form, number)
                (tmp_path / "f.arrow").write_bytes(data)
                refusal = read_all(tmp_path / "f.arrow", kind)
                assert "alloc" not in refusal and "memory" not in refusal.lower(), refusal

    in_child_with_little_memory(work)


# Streams that are well formed and hostile


@pytest.mark.parametrize(
    ("counts", "offsets"),
    [
        ([2, 2, 2], [0, 4, 2, 6]),
        ([2, -2, 6], [0, 2, 0, 6]),
        ([2, 2, 2], [0, 2, 4, 600]),
        ([2, 2, 2], [-2, 0, 2, 4]),
        ([0x7FFFFFFF, 0x7FFFFFFF, 4], [0, 0x7FFFFFFF, -2, 2]),
        ([2, 2, 2], [0, -1000, 4, 6]),
        ([2, 2, 2], [4, 6, 8, 10]),
    ],
)
def test_hostile_list_offsets_are_refused(tmp_path: Path, counts: list[int], offsets: list[int]) -> None:
    columns = {
        "id_cnt": pa.array(counts, pa.int32()),
        "token_id": pa.array([[1, 2]] * 3, pa.list_(pa.int32())),
        "prob": pa.array([np.ones(2, np.float16)] * 3, pa.list_(pa.float16())),
        "label": pa.array([1, 2, 3], pa.int32()),
    }
    content = stream_bytes([pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))])
    honest = struct.pack("<4i", 0, 2, 4, 6)
    assert content.count(honest) == 2
    path = tmp_path / "f.arrow"
    for changed in (1, 2):
        path.write_bytes(content.replace(honest, struct.pack("<4i", *offsets), changed))
        assert read_all(path, KNNTargets) != ""


def test_compressed_streams_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    rows = 1 << 22
    batch = datastore_batch(np.zeros((rows, 16), np.float16), np.zeros(rows, np.int32))
    content = stream_bytes([batch], compression="zstd")
    assert len(content) < 1 << 20
    (tmp_path / "f.arrow").write_bytes(content)
    del batch
    before = pa.total_allocated_bytes()

    def work() -> None:
        assert "compressed" in read_all(tmp_path / "f.arrow", Datastore)
        assert pa.total_allocated_bytes() <= before

    in_child_with_little_memory(work, spare=100_000_000)


def test_further_columns_are_ignored_but_not_dictionaries(tmp_path: Path) -> None:
    columns = {"keys": KEY_LISTS, "vals": pa.array(range(ROWS), pa.int32()), "text": pa.array(["a"] * ROWS)}
    (tmp_path / "f.arrow").write_bytes(stream_bytes(loose(columns)))
    assert read_all(tmp_path / "f.arrow", Datastore) == ""
    columns["text"] = columns["text"].dictionary_encode()
    (tmp_path / "f.arrow").write_bytes(stream_bytes(loose(columns)))
    assert "dictionary" in read_all(tmp_path / "f.arrow", Datastore)


def test_a_column_twice_and_keys_of_absurd_width_are_refused(tmp_path: Path) -> None:
    vals = pa.array(range(ROWS), pa.int32())
    batch = pa.RecordBatch.from_arrays([KEY_LISTS, vals, vals], names=["keys", "vals", "vals"])
    (tmp_path / "f.arrow").write_bytes(stream_bytes([batch]))
    assert "two columns have the same name" in read_all(tmp_path / "f.arrow", Datastore)
    schema = pa.schema({"keys": pa.list_(pa.float16(), 0x7FFFFFFF), "vals": pa.int32()})
    write_single_file(tmp_path / "f.arrow", schema, [])
    assert "keys of width 2147483647" in read_all(tmp_path / "f.arrow", Datastore)


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_pickles_in_any_disguise_are_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    poison = pickle.dumps(Payload(trap))
    field = pa.field("vals", pa.int32(), metadata={
        "ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": poison
    })  # fmt: skip
    schema = pa.schema([pa.field("keys", KEY_LISTS.type), field], metadata={"huggingface": poison, "pandas": poison})
    batch = pa.RecordBatch.from_arrays([KEY_LISTS, pa.array(range(ROWS), pa.int32())], schema=schema)
    (tmp_path / "a.arrow").write_bytes(stream_bytes([batch]))
    read_all(tmp_path / "a.arrow", Datastore)
    for name in ("b.arrow", "vals.npy", "vals.pkl", "manifest.json"):
        (tmp_path / name).write_bytes(poison)
    np.save(tmp_path / "objects.npy", np.array([Payload(trap)], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "zip.npy", "w") as archive:
        archive.writestr("vals.npy", (tmp_path / "objects.npy").read_bytes())
    assert read_all(tmp_path / "b.arrow", Datastore) != ""
    for name in ("vals.npy", "objects.npy", "zip.npy", "vals.pkl", "b.arrow"):
        with pytest.raises(InputError):
            load_values(tmp_path / name)
    with pytest.raises(InputError, match="is not readable JSON"):
        Datastore.open(tmp_path)
    assert not trap.exists()


NPY = io.BytesIO()
np.save(NPY, np.arange(20, dtype=np.int32))


@ANY_BYTES
@given(content=damaged(NPY.getvalue()))
def test_any_damage_to_an_npy_gives_values_or_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "vals.npy"
    path.write_bytes(content)
    try:
        values = load_values(path)
    except InputError:
        return
    assert values.dtype == np.int32 and values.ndim == 1 and isinstance(int(values.sum()), int)


@pytest.mark.parametrize("shape", ["(1152921504606846976,)", "(-4,)", "(2, 10)", "(True,)", "(20, 1, 1)", "(0,)"])
def test_an_npy_with_an_absurd_shape_is_refused(tmp_path: Path, shape: str) -> None:
    header = f"{{'descr': '<i4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    (tmp_path / "vals.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + header.encode() + bytes(80))
    with pytest.raises(InputError, match="not the values of a datastore"):
        load_values(tmp_path / "vals.npy")


# Pipes and devices


@pytest.mark.parametrize("name", ["d.arrow", "vals.npy", "manifest.json", "state.json", "knn_0.arrow"])
def test_a_pipe_does_not_make_a_reader_wait(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    path = tmp_path if name in ("manifest.json", "state.json", "knn_0.arrow") else tmp_path / name
    with pytest.raises(InputError, match=r"not a regular file|no Arrow file"):
        load_values(path)


def test_a_link_to_a_device_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "d.arrow").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="is not a regular file"):
        Datastore.open(tmp_path / "d.arrow")


def test_a_lock_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("text")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match="is a link"):
        PartedOutput(
            tmp_path / "out", kind="datastore", settings={}, part_rows=[1], schema=datastore_schema(DIM, logprob=True)
        )
    assert (tmp_path / "precious").read_text() == "text"


# Manifests and state files


def folder_of_parts(path: Path) -> Path:
    schema = datastore_schema(DIM, logprob=True)
    output = PartedOutput(path, kind="datastore", settings={"model": "m"}, part_rows=[5, 7], schema=schema)
    for number, bounds in enumerate([(0, 5), (5, 12)]):
        with output.write(number) as part:
            part.write(key_batch(*bounds))
    output.finish()
    return path


def change(folder: Path, *keys: Any, value: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    functools.reduce(lambda place, key: place[key], keys[:-1], manifest)[keys[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "name",
    [
        "../secret.arrow", "/etc/passwd", "part-00000.arrow/../../secret.arrow", "part-00000.arrow\0", "", ".", "..",
        "part-0.arrow", "part-٠٠٠٠٠.arrow", "part-00000.arrow\n", "xpart-00000.arrow", "sub/part-00000.arrow",
        "..\\part-00000.arrow", 7, None, ["part-00000.arrow"], {"a": 1}, "part-00001.arrow",
    ],
)  # fmt: skip
def test_a_part_name_that_is_no_plain_part_name_is_refused(tmp_path: Path, name: Any) -> None:
    folder = folder_of_parts(tmp_path / "d")
    write_single_file(tmp_path / "secret.arrow", key_batch(0, 5).schema, [key_batch(0, 5)])
    change(folder, "parts", 0, "file", value=name)
    with pytest.raises(InputError, match=r"part file name|listed twice"):
        Datastore.open(folder)


@pytest.mark.parametrize("key", ["rows", "bytes"])
@pytest.mark.parametrize("value", [10**18, 10**40, -1, 1.5, True, "5", None, [5], 6])
def test_absurd_counts_in_a_manifest_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    folder = folder_of_parts(tmp_path / "d")
    change(folder, "parts", 0, key, value=value)
    with pytest.raises(InputError):
        Datastore.open(folder)
    if key == "rows":
        change(folder, "rows", value=value + 7 if type(value) is int else value)
        with pytest.raises(InputError):
            Datastore.open(folder)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("format",), "other"), (("format",), None), (("format_version",), 2), (("format_version",), "1"),
        (("kind",), "index"), (("kind",), ["datastore"]), (("complete",), "yes"), (("complete",), 1),
        (("parts",), {}), (("parts",), [None, None]), (("parts",), []), (("parts", 0), []), (("parts", 1), None),
        (("settings",), []), (("info",), 3), (("history",), {}), (("columns",), "keys"),
        (("parts", 0, "sha256"), "0" * 63), (("parts", 0, "sha256"), 5), (("rows",), 13),
    ],
)  # fmt: skip
def test_a_manifest_with_fields_of_the_wrong_kind_is_refused(tmp_path: Path, keys: tuple, value: Any) -> None:
    folder = folder_of_parts(tmp_path / "d")
    change(folder, *keys, value=value)
    with pytest.raises(InputError, match="manifest"):
        Datastore.open(folder)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", '"x"', "[" * 100_000, '{"format": ' + "9" * 5000 + "}", "\udcff", '{"a": NaN}'],
    ids=range(9),
)
def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"manifest\.json: "):
        Datastore.open(tmp_path)
    with pytest.raises(InputError, match=r"manifest\.json: "):
        PartedOutput(tmp_path, kind="datastore", settings={}, part_rows=[1], schema=datastore_schema(DIM))


def test_a_manifest_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()
    os.truncate(tmp_path / "manifest.json", 1 << 40)
    with pytest.raises(InputError, match="too large to be a manifest"):
        Datastore.open(tmp_path)


ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["part-00000.arrow", "part-00002.arrow", "datastore", "a" * 64, 12, 1 << 70]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def parts_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = folder_of_parts(tmp_path_factory.mktemp("hostile") / "d")
    return folder, (folder / "manifest.json").read_text()


@ANY_BYTES
@given(data=st.data())
def test_any_change_to_a_manifest_gives_the_rows_or_one_line(
    parts_folder: tuple[Path, str], data: st.DataObject
) -> None:
    folder, original = parts_folder
    manifest = json.loads(original)
    if data.draw(st.booleans()):
        manifest |= {"complete": False, "part_rows": [5, 7]}
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = manifest
        while isinstance(place, (dict, list)) and place:
            key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if data.draw(st.booleans()) or not isinstance(place[key], (dict, list)):
                place[key] = data.draw(ANY_JSON)
                break
            place = place[key]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    try:
        checked = read_manifest(folder)
        assert sum(record["rows"] for record in checked["parts"] if record) <= checked["rows"]
        store = Datastore.open(folder)
    except InputError:
        return
    assert store.rows == 12 and np.array_equal(np.sort(store.vals()), np.arange(12))


@pytest.mark.parametrize(
    "files",
    [
        None, {}, [], "x", [7], [{}], [{"filename": 3}], [{"filename": "../f.arrow"}], [{"filename": "/f.arrow"}],
        [{"filename": "f.arrow\0"}], [{"filename": "state.json"}], [{"filename": "gone.arrow"}],
        [{"filename": "f.arrow"}, {"filename": "f.arrow"}],
    ],
)  # fmt: skip
def test_a_hostile_state_file_is_refused(tmp_path: Path, files: Any) -> None:
    for place in (tmp_path / "f.arrow", tmp_path / "saved" / "f.arrow"):
        write_single_file(place, key_batch(0, 5).schema, [key_batch(0, 5)])
    (tmp_path / "saved" / "state.json").write_text(json.dumps({"_data_files": files}))
    with pytest.raises(InputError):
        Datastore.open(tmp_path / "saved")


def test_shard_names_with_absurd_numbers_are_refused(tmp_path: Path) -> None:
    name = "data-00000-of-999999999.arrow"
    write_single_file(tmp_path / name, key_batch(0, 5).schema, [key_batch(0, 5)])
    with pytest.raises(InputError, match="1 of 999999999 shards"):
        Datastore.open(tmp_path)
