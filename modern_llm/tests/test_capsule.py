"""A run in one file: the same bytes from the same files, nothing lost, nothing changed unseen, and
the report made again from it alone.
"""

import hashlib
import json
import os
import shutil
import zipfile

import pytest
from click.testing import CliRunner

from modern_llm.cli import main
from modern_llm.files import DamagedFolder, read_json, write_json
from modern_llm.messages import StageError
from modern_llm.report.page import Run
from modern_llm.report.write import compare_reports, write_report
from modern_llm.runs.capsule import (
    MANIFEST, check_capsule, files_of, stored_report, unpack, write_capsule,
)
from modern_llm.tests.test_report import make_run

STAGES = ("pretrain", "sft")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of one recipe, the first with its report, weights, locks and a path of this machine.
    """
    root = tmp_path_factory.mktemp("capsule") / "place" / "runs"
    for name, seed in (("small", 0), ("small-seed1", 1)):
        make_run(root, name, seed, stages=STAGES)
    params = root / "small" / "sft" / "params.json"
    write_json(params, {**read_json(params), "output_dir": str(root),
                        "data_files": {"t/x.jsonl": {"sha256": "ab"}}})
    for name in ("sft/checkpoint/model.safetensors", "sft/checkpoint/config.json",
                 "sft/checkpoint/meta.json", "sft/checkpoint/training_state.pt",
                 "sft/checkpoint.previous/model.safetensors", "sft/control/metrics.jsonl",
                 "pretrain/checkpoints/step-000003/model.safetensors",
                 "pretrain/checkpoints/step-000003/meta.json", "sft/answers_sft.jsonl",
                 "logs/sft-1.out", ".lock", "sft/.part.tmp"):
        (root / "small" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "small" / name).write_text(name)
    write_report("small", root, root / "small" / "report")
    return root


@pytest.fixture(scope="module")
def packed(runs):
    file = runs.parent / "small.zip"
    write_capsule(runs / "small", file)
    return file


def altered(packed, place, changes=(), manifest=None, raw=()):
    """A copy of a capsule with other contents (None: without the file), its manifest's sums `as` in
    the function `manifest`, and with further entries.
    """
    with zipfile.ZipFile(packed) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    for name, content in dict(changes).items():
        if content is None:
            del found[name]
        else:
            found[name] = content
    if manifest:
        found[MANIFEST] = json.dumps(manifest(json.loads(found[MANIFEST]), found)).encode()
    with zipfile.ZipFile(place, "w") as archive:
        for name, content in [*found.items(), *raw]:
            archive.writestr(name, content)
    return place


def forged(manifest, found):
    """The manifest of what is there now."""
    return manifest | {"files": {name: hashlib.sha256(content).hexdigest()
                                 for name, content in found.items() if name != MANIFEST}}


def typed(*words):
    done = CliRunner().invoke(main, ["capsule", *map(str, words)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_the_same_files_give_the_same_bytes(runs, packed, tmp_path):
    copy = tmp_path / "x" / "runs"
    shutil.copytree(runs, copy)
    for path in copy.rglob("*"):
        os.utime(path, (1, 1))
    target = tmp_path / "again.zip"
    write_capsule(copy / "small", target)
    one, other = (zipfile.ZipFile(path) for path in (packed, target))
    assert one.namelist() == sorted(one.namelist()[:-1]) + [MANIFEST] == other.namelist()
    assert {info.date_time[0] for info in one.infolist()} == {1980}
    for name in one.namelist()[:-1]:
        assert one.read(name) == other.read(name)
    before = packed.read_bytes()
    write_capsule(runs / "small", packed, force=True)
    assert packed.read_bytes() == before
    assert [path.name for path in packed.parent.iterdir()] == ["runs", "small.zip"]


def test_it_holds_the_record_and_not_the_weights(runs, packed):
    names = set(zipfile.ZipFile(packed).namelist())
    assert {f"runs/small/{name}" for name in
            ("run.json", "sft/params.json", "sft/results.json", "sft/metrics.jsonl",
             "sft/control/metrics.jsonl", "sft/answers_sft.jsonl")} <= names
    assert {"runs/small-seed1/run.json", "report/small_report.md",
            "report/results/small/seeds.csv", "report/figures/small/sft.png"} <= names
    assert not [name for name in names if "checkpoint" in name or "lock" in name or "tmp" in name
                or "logs" in name]
    manifest = json.loads(zipfile.ZipFile(packed).read(MANIFEST))
    assert manifest["files"].keys() == names - {MANIFEST}
    assert manifest["data"] == {"t/x.jsonl": "ab"} and manifest["report_was"] == "stored"
    more = files_of(runs / "small", weights=True).keys() - files_of(runs / "small").keys()
    assert more == {"sft/checkpoint/model.safetensors", "sft/checkpoint/config.json",
                    "pretrain/checkpoints/step-000003/model.safetensors",
                    "pretrain/checkpoints/step-000003/meta.json"}


def test_the_report_is_made_again_from_it_alone(packed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = typed(packed, "--check")
    assert done.exit_code == 0, done.output
    assert "each as in its manifest" in done.output and "equal pixel by pixel" in done.output
    _, compared = check_capsule(packed)
    assert {row.file for row in compared} >= {"small_report.md", "results/small/seeds.csv",
                                              "results/small/made_from.csv"}
    assert not list(tmp_path.iterdir())
    with zipfile.ZipFile(packed) as archive:  # a path of this machine, as written where it ran
        assert "--output-dir runs " in archive.read("report/small_report.md").decode()


def test_a_forged_number_is_not_in_the_report(packed, tmp_path):
    inside = "runs/small/sft/results.json"
    content = json.loads(zipfile.ZipFile(packed).read(inside))
    content["table"][0]["value"] = 0.99
    file = altered(packed, tmp_path / "x.zip", {inside: json.dumps(content).encode()}, forged)
    done = typed(file, "--check")
    assert done.exit_code == 1
    for name in ("small_report.md", "results/small/sft.json", "results/small/made_from.csv"):
        assert f"  {name} differs, first in line " in done.output
    assert "figures/small/pretrain.png" not in done.output


def test_a_flipped_byte_is_named(packed, tmp_path):
    inside = "runs/small/sft/metrics.jsonl"
    with zipfile.ZipFile(packed) as archive:
        content = bytearray(archive.read(inside))
        offset = archive.getinfo(inside).header_offset
    content[7] ^= 1
    done = typed(altered(packed, tmp_path / "x.zip", {inside: bytes(content)}), "--check")
    assert done.exit_code == 1 and f"{inside} in {tmp_path / 'x.zip'} was changed" in done.output
    data = bytearray(packed.read_bytes())
    data[offset + 30 + len(inside) + 40] ^= 16  # of what is compressed
    (tmp_path / "y.zip").write_bytes(data)
    done = typed(tmp_path / "y.zip", "--check")
    assert done.exit_code == 1 and f"{inside} in {tmp_path / 'y.zip'} is damaged" in done.output
    assert len(done.output.splitlines()) == 1


def test_no_flipped_byte_goes_unseen(packed, tmp_path):
    """Wherever a bit is flipped, the capsule is refused, or what is unpacked is what was packed."""
    data, file, refused = packed.read_bytes(), tmp_path / "x.zip", 0
    unpack(packed, tmp_path / "whole")
    inside = lambda folder: {path.relative_to(folder): path.read_bytes()
                             for path in folder.rglob("*") if path.is_file()}
    whole = inside(tmp_path / "whole")
    for number in range(80):
        place = (len(data) - 1) * number // 79 if number % 2 else len(data) - 40 * number - 1
        changed = bytearray(data)
        changed[place] ^= 1 << number % 8
        file.write_bytes(changed)
        try:
            unpack(file, tmp_path / str(number))
        except (DamagedFolder, StageError):
            refused += 1
        else:
            assert inside(tmp_path / str(number)) == whole, place
        shutil.rmtree(tmp_path / str(number), ignore_errors=True)
    assert refused > 40


PLANS = {
    "lacks runs/small/run.json": dict(changes={"runs/small/run.json": None}),
    "holds runs/small/more.json, which its manifest does not": dict(
        changes={"runs/small/more.json": b"{}"}),
    "holds '../evil.txt', a path that no capsule has": dict(raw=[("../evil.txt", b"x")]),
    "holds '/evil.txt'": dict(raw=[("/evil.txt", b"x")]),
    "holds 'runs/../../evil.txt'": dict(raw=[("runs/../../evil.txt", b"x")]),
    "holds 'C:evil.txt'": dict(raw=[("C:evil.txt", b"x")]),
    "holds 'runs/small/run.json/x'": dict(raw=[("runs/small/run.json/x", b"x")]),
    "has no manifest.json": dict(changes={MANIFEST: None}),
    "is of form 9": dict(manifest=lambda old, found: old | {"capsule": 9}),
    "manifest.json in ": dict(changes={MANIFEST: b"[1]"}),
    "is not one (KeyError: 'run')": dict(manifest=lambda old, found: {"capsule": 1}),
    "it lacks the run": dict(manifest=lambda old, found: old | {"run": ".."}),
}


@pytest.mark.parametrize("said", PLANS)
def test_what_is_no_whole_capsule_is_refused_in_one_line(packed, tmp_path, said):
    place = tmp_path / "in"
    place.mkdir()
    done = typed(altered(packed, place / "x.zip", **PLANS[said]), "--check")
    assert done.exit_code == 1 and said in done.output, done.output
    assert len(done.output.splitlines()) == 1 and "pack the run anew" in done.output + "newer" * (
        "form 9" in said) or "another program" in done.output or "form 9" in said
    assert not list(tmp_path.rglob("evil*")) and os.listdir(place) == ["x.zip"]


def test_two_files_of_one_name_and_a_cut_archive(packed, tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"):
        file = altered(packed, tmp_path / "x.zip", raw=[(MANIFEST, b"{}")])
    with pytest.raises(DamagedFolder, match="two files of one name"):
        unpack(file, tmp_path / "out")
    for content in (packed.read_bytes()[:-40], b"", b"no archive"):
        file.write_bytes(content)
        with pytest.raises(DamagedFolder, match="is no capsule, or a part of it is missing"):
            unpack(file, tmp_path / "out")
    with pytest.raises(StageError, match="gone.zip cannot be unpacked: No such file"):
        check_capsule(tmp_path / "gone.zip")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over_or_packed_half(runs, packed, tmp_path, monkeypatch):
    before = packed.read_bytes()
    given = ["--output-dir", runs]
    assert "exists: --force" in typed("small", "--to", packed, *given).output
    assert packed.read_bytes() == before
    assert "did you mean 'small'" in typed("smal", *given).output
    assert "no finished stage" in typed(make_run(tmp_path, "bare", stages=())).output
    assert "no small_report.md" in typed("small", "--report", tmp_path, "--to", tmp_path / "x.zip",
                                         *given).output.replace("has ", "")
    assert "is a file: --check" in typed(packed).output
    assert "lies in the run's own folder" in typed(
        "small", "--to", runs / "small" / "eval" / "x.zip", *given).output
    assert not list((runs / "small").rglob("*.zip"))
    assert "leave --to" in typed(packed, "--check", "--to", "x").output
    assert "cannot write to" in typed("small", "--to", tmp_path / "no" / "x.zip", *given).output
    monkeypatch.setattr("modern_llm.runs.capsule.is_in_use", lambda folder: True)
    assert "is under way" in typed("small", "--to", tmp_path / "x.zip", *given).output
    assert not list(tmp_path.glob("*.zip")) and not list(tmp_path.glob(".*"))


def test_a_run_without_a_report_gets_one(runs, tmp_path):
    run = tmp_path / "small"
    shutil.copytree(runs / "small", run, ignore=shutil.ignore_patterns("report"))
    assert stored_report(Run(run)) is None
    done = typed(run, "--to", tmp_path / "x.zip")
    assert done.exit_code == 0 and "its report was made while packing" in done.output
    assert not (run / "report").exists()


def test_a_report_beside_another_one_is_packed_by_its_name(runs, tmp_path):
    run = tmp_path / "small"
    shutil.copytree(runs / "small", run, ignore=shutil.ignore_patterns("report"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "small_report.md").write_text("another run's")
    stamped = write_report("small", tmp_path, tmp_path / "out")
    write_json(run / "run.json", {**read_json(run / "run.json"), "report": {"path": str(stamped)}})
    assert stored_report(Run(run)) == stamped != tmp_path / "out" / "small_report.md"
    manifest = write_capsule(run, tmp_path / "x.zip")
    assert manifest["report"] == f"report/{stamped.name}"
    manifest, compared = check_capsule(tmp_path / "x.zip")
    assert [row for row in compared if row.difference] == [] and len(compared) > 5
    # of other files than it was made of
    (run / "sft" / "metrics.jsonl").write_text("")
    assert stored_report(Run(run)) is None


def test_pictures_are_compared_by_their_pixels(runs, tmp_path):
    import matplotlib.image
    import numpy as np

    image = np.zeros((4, 6, 3), np.uint8)
    places = [tmp_path / f"{name}.png" for name in "abc"]
    matplotlib.image.imsave(places[0], image)
    matplotlib.image.imsave(places[1], image, metadata={"Title": "packed in another way"})
    image[1, 2] = 255
    matplotlib.image.imsave(places[2], image)
    assert places[0].read_bytes() != places[1].read_bytes()
    found = [compare_reports({"x.png": places[0]}, {"x.png": other})[0] for other in places[1:]]
    assert [row.difference for row in found] == ["", "differs in 1 pixel"]
    only, = compare_reports({"x.csv": places[0]}, {})
    assert only.how == "bytes" and "was not made again" in only.difference
