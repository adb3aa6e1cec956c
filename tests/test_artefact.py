"""Artefacts are complete or begun, and say what they were made from; files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import json
from types import SimpleNamespace

import pytest
from harness import run

from utils.artefact import BEGUN, Made, begin, read_made, record_path, require
from utils.errors import InputError
from utils.files import atomic, ensure_folder, read_json, write_json

pytestmark = pytest.mark.unit

MADE = Made("datastore", {"dim": 4, "subset": "train"}, 10, {"base": "b" * 64, "windows": None})
OTHER = Made("datastore", {"dim": 8, "subset": "train"}, 10, {"base": "b" * 64, "windows": None})


@pytest.fixture(params=["folder", "x.index", "gate.safetensors"])
def path(request, tmp_path):
    return tmp_path / request.param


def content(path):
    return path if path.suffix else path / "part-00000.arrow"


def finished(path, made=MADE, **options):
    making = begin(path, made, **options)
    assert not making.done
    content(path).write_text("rows")
    return making.finish()


def test_a_finished_artefact_is_found_by_its_record(path):
    assert read_made(path) is None
    assert finished(path) == MADE == read_made(path)
    assert read_made(path).id == MADE.id != OTHER.id and read_made(path, BEGUN) is None
    again = begin(path, MADE)
    assert again.done and again.finish() == MADE


def test_an_interrupted_artefact_is_continued_by_the_same_settings_only(path):
    making = begin(path, MADE)
    content(path).write_text("rows")
    making.close()
    with pytest.raises(InputError, match="dim"):
        begin(path, OTHER)
    again = begin(path, MADE)
    assert not again.done and content(path).read_text() == "rows" and again.finish() == read_made(path)


def test_overwrite_deletes_what_is_complete_or_of_other_settings(path):
    finished(path)
    for made in (MADE, OTHER):
        making = begin(path, made, overwrite=True)
        assert not making.done and not content(path).exists() and read_made(path) is None
        content(path).write_text("rows")
        making.finish()
        assert read_made(path) == made
    begin(path, MADE, overwrite=True).close()
    content(path).write_text("half")
    again = begin(path, MADE, overwrite=True)  # interrupted: it continues
    assert not again.done and content(path).read_text() == "half"
    again.close()


def test_foreign_files_are_neither_used_nor_deleted(path):
    content(ensure_folder(path) if not path.suffix else path).write_text("precious")
    with pytest.raises(InputError, match=content(path).name):
        begin(path, MADE)
    assert content(path).read_text() == "precious" and not record_path(path, BEGUN).exists()


def test_a_rank_makes_every_nth_part_that_is_missing(tmp_path):
    shared = {"num_processes": 2, "wait_for_everyone": lambda: None}
    ranks = (SimpleNamespace(process_index=rank, is_main_process=rank == 0, **shared) for rank in (0, 1))
    main, second = (begin(tmp_path / "a", MADE, state=state) for state in ranks)
    assert main.own_parts(5) == [0, 2, 4] and second.own_parts(5) == [1, 3]
    main.part(2).write_text("rows")
    assert main.own_parts(5) == [0, 4]
    second.finish()
    assert read_made(tmp_path / "a") is None
    main.finish()
    assert read_made(tmp_path / "a") == MADE


def test_two_runs_cannot_write_into_one_folder(tmp_path):
    making = begin(tmp_path / "a", MADE)
    code = "from utils.artefact import Made, begin; begin('{}', Made('datastore'))"
    second = run("-c", code.format(tmp_path / "a"), check=False)
    assert second.returncode and f"{tmp_path / 'a'}: another run" in second.stderr
    assert making.finish() == read_made(tmp_path / "a")


def test_require_compares_what_both_sides_know():
    require("a", MADE, base="b" * 64, windows="w", dim=4, unknown=1)
    require("a", None, base="c")
    for wrong in ({"base": "c" * 64}, {"dim": 8}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            require("a", MADE, **wrong)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_atomic_replaces_the_whole_or_leaves_the_old(tmp_path, kind):
    def write(path, text):
        (ensure_folder(path) / text if kind == "folder" else path).write_text(text)

    target = tmp_path / "target"
    for text in ("old", "new"):
        with atomic(target) as temporary:
            write(temporary, text)
    with pytest.raises(OSError) as failed, atomic(target) as temporary:
        write(temporary, "newer")
        raise OSError(errno.ENOSPC, "no space")
    assert failed.value.filename == str(target)
    assert list(tmp_path.iterdir()) == [target]
    (file,) = target.iterdir() if kind == "folder" else [target]
    assert file.read_text() == "new"


def test_json_is_read_as_it_was_written_or_refused(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, float("nan")], "y": "é", "z": float("-inf")})
    assert json.loads((tmp_path / "a.json").read_text())["z"] == "-inf"
    assert read_json(tmp_path / "a.json") == {"x": [1, "nan"], "y": "é", "z": float("-inf")}
    (tmp_path / "a.json").write_text("{")
    for name in ("a.json", "b.json"):
        with pytest.raises(InputError, match=name):
            read_json(tmp_path / name)
