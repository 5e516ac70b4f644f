"""Atomic writes under faults: the old content or the new one, never a part."""

import json
import os
import random
import signal
import sys
import time

import numpy as np
import pandas as pd
import pytest

from modern_llm import files


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def write_version(folder, text):
    with files.atomic_folder(folder, {"version": text}) as temporary:
        (temporary / "a.txt").write_text(text)


def test_folder_appears_whole_and_replaces(tmp_path):
    folder = tmp_path / "checkpoint"
    write_version(folder, "one")
    write_version(folder, "two")
    assert files.check_folder(folder)["version"] == "two"
    assert names(tmp_path) == ["checkpoint"]


def test_failure_inside_changes_nothing(tmp_path):
    folder = tmp_path / "checkpoint"
    write_version(folder, "one")
    with pytest.raises(RuntimeError, match="boom"), files.atomic_folder(folder) as temporary:
        (temporary / "a.txt").write_text("half")
        raise RuntimeError("boom")
    assert files.check_folder(folder)["version"] == "one"
    assert names(tmp_path) == ["checkpoint"]


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("after", range(4))
def test_fault_at_any_file_operation_leaves_a_whole_folder(tmp_path, monkeypatch, call, after):
    folder = tmp_path / "checkpoint"
    write_version(folder, "one")
    real, count = getattr(os, call), iter(range(100))

    def failing(*arguments):
        if next(count) == after:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, failing)
        try:
            write_version(folder, "two")
            wrote = True
        except OSError:
            wrote = False
    found = files.check_folder(files.find_folder(folder))["version"]
    assert found == "two" if wrote else found in ("one", "two")
    assert (files.find_folder(folder) / "a.txt").read_text() == found


def test_the_former_content_is_kept_on_request(tmp_path):
    folder = tmp_path / "checkpoint"
    for version in ("one", "two", "three"):
        with files.atomic_folder(folder, {"version": version}, keep_previous=True) as temporary:
            (temporary / "a.txt").write_text(version)
    kept = [files.check_folder(place)["version"] for place in (folder, files.previous_of(folder))]
    assert kept == ["three", "two"] and names(tmp_path) == ["checkpoint", "checkpoint.previous"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_before_any_file_operation_loses_one_generation_at_most(tmp_path):
    """kill -9 of a process that replaces a folder with two generations: before its 1st, 2nd, … file
    operation, until it comes through.
    """
    operations = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}
    for number in range(100):
        folder = tmp_path / str(number) / "checkpoint"
        for version in ("one", "two"):
            with files.atomic_folder(folder, {"version": version}, keep_previous=True) as temporary:
                (temporary / "a.txt").write_text(version)
        child = os.fork()
        if child == 0:
            left = iter(range(number, -1, -1))
            sys.addaudithook(lambda event, _: event in operations and next(left) == 0
                                              and os.kill(os.getpid(), signal.SIGKILL))
            with files.atomic_folder(folder, {"version": "three"}, keep_previous=True) as temporary:
                (temporary / "a.txt").write_text("three")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found = files.check_folder(files.find_folder(folder))["version"]
        assert found in ("two", "three"), f"killed before file operation {number}"
        if os.WIFEXITED(status):
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert found == "three" and number >= 12


def test_any_flipped_bit_is_noticed(tmp_path):
    seed = time.time_ns()
    print(f"seed {seed}")
    draw = random.Random(seed)
    folder = tmp_path / "checkpoint"
    write_version(folder, "some words")
    for name in ("a.txt", "meta.json") * 50:
        path = folder / name
        whole = path.read_bytes()
        position, bit = draw.randrange(len(whole)), draw.randrange(8)
        path.write_bytes(
            whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1:])
        with pytest.raises(files.DamagedFolder):
            print(f"{name}: byte {position}, bit {bit}: {files.check_folder(folder)}")
        path.write_bytes(whole)
    files.check_folder(folder)


def test_damage_is_named(tmp_path):
    folder = tmp_path / "checkpoint"
    write_version(folder, "one")
    (folder / "a.txt").write_text("onE")
    with pytest.raises(files.DamagedFolder, match="a.txt is truncated or changed"):
        files.check_folder(folder)
    (folder / "a.txt").unlink()
    with pytest.raises(files.DamagedFolder, match="a.txt is missing"):
        files.check_folder(folder)
    (folder / "meta.json").write_text("[]")
    with pytest.raises(files.DamagedFolder, match="meta.json is missing or damaged"):
        files.check_folder(folder)
    (folder / "meta.json").rename(tmp_path / "elsewhere.json")
    (tmp_path / "checkpoint.previous").mkdir()
    (tmp_path / "elsewhere.json").rename(tmp_path / "checkpoint.previous" / "meta.json")
    with pytest.raises(FileNotFoundError, match="its meta.json is missing"):  # no silent step back
        files.find_folder(folder)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        files.find_folder(tmp_path / "nowhere")


def test_text_is_replaced_or_kept(tmp_path, monkeypatch):
    path = files.write_text(tmp_path / "f.txt", "old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError):
        files.write_text(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["f.txt"]


@pytest.mark.fault("one-lacks")
@pytest.mark.parametrize("unknown", [float("nan"), float("inf"), -float("inf"), np.float64("nan")])
def test_what_is_not_known_is_null(unknown, tmp_path):
    value = {"loss": unknown, "table": [{"floor": unknown, "n": 3}, (unknown, "NaN")], "lr": 0.1}
    read = json.loads(files.write_json(tmp_path / "f.json", value).read_text(),
                      parse_constant=pytest.fail)
    assert read == {"loss": None, "table": [{"floor": None, "n": 3}, [None, "NaN"]], "lr": 0.1}
    with files.atomic_folder(tmp_path / "folder", {"floor": unknown}) as folder:
        (folder / "a").write_text("a")
    assert files.check_folder(tmp_path / "folder")["floor"] is None


def test_kept_frame_makes_a_table_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return pd.DataFrame({"value": [1.5, None], "text": ["12", "a\nb"],
                             "nothing": [None, None], "right": [True, False]})

    first, again = (files.cached_frame(tmp_path / "deep" / "table.jsonl", make) for _ in range(2))
    assert made == [1] and first.equals(again)
    assert first.text.tolist() == ["12", "a\nb"] and first.right.tolist() == [True, False]
    assert first.nothing.dtype == float and first.nothing.isna().all()
