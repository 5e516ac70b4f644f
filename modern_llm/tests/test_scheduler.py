"""SLURM as clusters really answer it, played by scripts: greetings, warnings, arrays, silence; and
runs of which some are damaged.
"""

import json
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from modern_llm.cli import main
from modern_llm.cluster import submit
from modern_llm.cluster.jobs import note_job, note_this_job
from modern_llm.runs import locks, scheduler
from modern_llm.runs.outcomes import runs_table
from modern_llm.runs.scheduler import MARK, CommandOutput, is_shown_as, job_states

ROOT = Path(__file__).resolve().parents[2]
fault = pytest.mark.fault("scheduler")

# A command of SLURM: it says `before`, then a row for each job of `jobs` in the format that it was
# asked for, then `after`.
PROGRAM = """#!{python} -SE
import json, os, sys, time
played = json.load(open({path!r}))
words = sys.argv[1:]
with open({path!r} + ".calls", "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), os.getcwd(), words, dict(os.environ)]) + "\\n")
out = sys.stdout.buffer
out.write(played.get("before", "").encode("latin-1")); out.flush()
sys.stderr.write(played.get("err", ""))
time.sleep(played.get("seconds", 0))
form = words[max(i for i, w in enumerate(words) if w in ("-o", "--format")) + 1] if {{"-o", "--format"}} & set(words) else ""
for job in played.get("jobs", []):
    if "%" in form:
        row = form
        for name, value in job.items():
            row = row.replace("%" + name, value)
    else:
        row = "|".join(job.get(field.split("%")[0], "") for field in form.split(","))
    out.write((row + "\\n").encode())
out.write(played.get("after", "").encode("latin-1"))
sys.exit(played.get("code", 0))
"""


@pytest.fixture
def play(tmp_path, monkeypatch):
    """Put commands of SLURM on the PATH, and no others."""
    folder = tmp_path / "slurm-bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{Path(sys.executable).parent}:/usr/bin:/bin")
    which = shutil.which
    monkeypatch.setattr(
        shutil, "which",
        lambda name, *rest, **more: str(folder / name) if (folder / name).exists()
                                    else None if name in ("squeue", "sacct", "sinfo",
                                                          "sbatch", "scancel", "scontrol")
                                         else which(name, *rest, **more))

    def put(name: str, **played) -> Path:
        path = folder / f"{name}.json"
        path.write_text(json.dumps(played))
        (folder / name).write_text(PROGRAM.format(python=sys.executable, path=str(path)))
        (folder / name).chmod(0o755)
        return Path(f"{path}.calls")

    return put


def row(number: str, state: str, shown: str = "", reason: str = "None") -> dict:
    """A job as squeue and sacct know it."""
    return {"A": number, "i": shown or number, "T": state, "r": reason, "JobIDRaw": number,
            "JobID": shown or number, "State": state}


GREETINGS = ["", "Welcome to Lonestar6\n", "news | maintenance | tomorrow\n", "990|RUNNING|None\n",
             "\x1b[31mWARNING\x1b[0m: quota 95%\n\n", "caf\xe9 \xff\xfe\n",
             "slurm_load_jobs: 990 PENDING\n", "\r\n \t\n", "|||\n"]


@fault
@pytest.mark.parametrize("greeting", GREETINGS)
def test_a_greeting_is_no_row(play, greeting):
    play("squeue", before=greeting, jobs=[row("990", "PENDING", reason="Dependency"),
                                          row("991", "RUNNING"), row("7", "RUNNING")],
         after=greeting)
    play("sacct", before=greeting, jobs=[row("992", "CANCELLED by 1000")], after=greeting,
         err="sacct: warning\n")
    play("sinfo", before=greeting,
         jobs=[{"P": "gpu*", "l": "2-00:00:00"}, {"P": "dev", "l": "infinite"}], after=greeting)
    assert (job_states(["990", "991", "992", "993"])
            == {"990": "PENDING (Dependency)", "991": "RUNNING", "992": "CANCELLED by 1000"})
    assert submit.partitions() == ({"gpu": 2880, "dev": None}, "gpu")
    assert scheduler.job_runs("991") is True and scheduler.job_runs("990") is False


@fault
@pytest.mark.parametrize("played", [{"before": "Slurm accounting storage is disabled\n"},
                                    {"err": "Slurm accounting storage is disabled\n"}])
@pytest.mark.parametrize("code", [0, 1])
def test_a_cluster_without_accounting(play, tmp_path, played, code):
    play("squeue", jobs=[])
    play("sacct", code=code, **played)
    note_job(tmp_path / "runs" / "one", "17", ["pretrain"], "sbatch …")
    done = CliRunner().invoke(main, ["status", "--output-dir", str(tmp_path / "runs")])
    assert (done.exit_code == 0 and "to do" in done.output
            and done.output.splitlines()[-1].split()[-1] == "17")


@fault
@pytest.mark.parametrize(
    "job, number, shown, state, same",
    [("990", "990", "990", "RUNNING", True), ("99", "990", "990", "RUNNING", False),
     ("993", "993", "990_3", "RUNNING", True), ("990_3", "993", "990_3", "RUNNING", True),
     ("990_3", "994", "990_4", "RUNNING", False), ("990_5", "990", "990_[4-9%2]", "PENDING", True),
     ("990_3", "990", "990_[4-9%2]", "PENDING", False),
     ("990_7", "990", "990_[1,3-5,7]", "PENDING", True),
     ("990_6", "990", "990_[0-8:2]", "PENDING", True),
     ("990_7", "990", "990_[0-8:2]", "PENDING", False), ("990", "990", "990+0", "RUNNING", True),
     ("991", "991", "990+1", "RUNNING", True), ("990", "990", "990_7", "PENDING", False),
     ("990", "990", "990_9", "RUNNING", True), ("990_3", "990", "990_[4-", "PENDING", False),
     ("990_x", "990", "990_[4-9]", "PENDING", False)])
def test_a_job_under_its_names(job, number, shown, state, same):
    assert is_shown_as(job, number, shown, state) is same


@fault
def test_tasks_of_arrays_and_parts_of_jobs_have_states(play):
    play("squeue", jobs=[row("990", "PENDING", "990_[4-9%2]", "JobArrayTaskLimit"),
                         row("995", "RUNNING", "990_2"), row("80", "RUNNING", "80+0")])
    play("sacct",
         jobs=[row("993", "COMPLETED", "990_3"), row("993.batch", "FAILED", "990_3.batch"),
               row("993.extern", "FAILED", "990_3.extern"), row("994", "OUT_OF_MEMORY", "990_1"),
               row("70", "NODE_FAIL", "70+0"), row("71", "COMPLETED", "70+1")])
    assert job_states([
        "993", "990_1", "990_2", "990_5", "80", "70", "990_3"
    ]) == {"993": "COMPLETED", "990_3": "COMPLETED", "990_1": "OUT_OF_MEMORY", "990_2": "RUNNING",
           "990_5": "PENDING (JobArrayTaskLimit)", "80": "RUNNING", "70": "NODE_FAIL"}


@fault
def test_a_task_of_an_array_is_noted_as_slurm_names_it(play, tmp_path, monkeypatch):
    for name, value in {"SLURM_JOB_ID": "993", "SLURM_ARRAY_JOB_ID": "990",
                        "SLURM_ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(name, value)
    note_this_job(tmp_path / "runs" / "rate-3", ["pretrain"])
    play("squeue", code=1, err="slurm_load_jobs error: Unable to contact slurm controller\n")
    play("sacct", jobs=[row("993", "FAILED", "990_3")])
    done = CliRunner().invoke(main, ["status", "--output-dir", str(tmp_path / "runs")])
    assert (done.exit_code == 0 and "990_3 FAILED" in done.output
            and "squeue: slurm_load_jobs error: Unable to contact" in done.output)


@fault
@pytest.mark.parametrize(
    "state, queued", [("PENDING (Priority)", True), ("CONFIGURING", True), ("REQUEUE_HOLD", True),
                      ("SPECIAL_EXIT", True), ("CANCELLED by 1000", False), ("CANCELLED+", False),
                      ("OUT_OF_MEMORY", False), ("PREEMPTED", False), ("", False)])
def test_which_jobs_are_queued(state, queued):
    assert scheduler.is_queued(state) is queued


@fault
def test_a_command_that_hangs_is_left(play, capfd):
    """Also where a shell waits for a child that holds the pipe open."""
    path = play("squeue").with_name("squeue")
    path.write_text("#!/bin/sh\necho hello\nsleep 60\n")
    assert (scheduler.slurm_command("squeue", seconds=0.2) is None
            and "squeue has not answered within 0.2 s" in capfd.readouterr().err)
    path.write_text("no program")
    assert (scheduler.slurm_command("squeue") is None
            and "squeue cannot be started" in capfd.readouterr().err)
    assert scheduler.slurm_command("sacct") is None


@fault
def test_a_users_own_filters_do_not_count(play, monkeypatch):
    monkeypatch.setenv("SQUEUE_PARTITION", "other")
    calls = play("squeue", jobs=[row("990", "RUNNING")])
    assert job_states(["990"]) == {"990": "RUNNING"} and "SQUEUE_PARTITION" not in calls.read_text()


@fault
@pytest.mark.parametrize(
    "printed, number",
    [("123\n", "123"), ("123;cluster2\n", "123"),
     ("Welcome\nProject quota: 40\n\n123;c\nBye\n", "123"), ("\x1b[32m123\x1b[0m\r\n", "123"),
     ("", None), ("sbatch: error\n", None), ("Submitted batch job\n", None)])
def test_the_number_in_what_sbatch_says(printed, number):
    assert scheduler.submitted(CommandOutput(0, printed, "")) == number


@fault
def test_a_lock_survives_a_greeting(play, tmp_path):
    """A job that runs on another host holds its run, also where squeue greets first."""
    play("squeue", before="Welcome\n", jobs=[row("8", "RUNNING")])
    owner = {"host": "c301-001", "pid": 5, "pid_started": 1.0, "what": "stage sft", "since": "now",
             "parent": {}, "job": "8", "attempt": 0, "token": ""}
    (tmp_path / locks.STAGE_LOCK).write_text(json.dumps(owner))
    assert locks.owner_of(tmp_path) == owner


# ---- submitting ----------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(play, tmp_path, monkeypatch):
    """A folder with data that is not the checkout, where commands are given; what sbatch was called
    with.
    """
    here = tmp_path / "my folder"
    (here / "data").mkdir(parents=True)
    (here / "notes, 1.txt").write_text("A note. " * 400)
    (here / "preset.json").write_text(json.dumps(
        {"base": "lesson", "name": "mine", "data": {"sources": ["notes, 1.txt", "synthetic"]}}))
    monkeypatch.chdir(here)
    monkeypatch.setenv("MODERN_LLM_RUNS", "my runs")
    monkeypatch.setenv("MODERN_LLM_DATA", "data")
    monkeypatch.delenv("MODERN_LLM_CACHE", raising=False)
    for name in ("squeue", "sacct", "sinfo", "scancel"):
        play(name, before="Welcome\n")
    return here, play("sbatch", before="Welcome to the cluster\n", after="123;cluster2\n")


@fault
@pytest.mark.parametrize(
    "words", [["--preset", "preset.json"],
              ["--preset", "lesson", "-p", "data.sources=[\"notes, 1.txt\",\"synthetic\"]"]])
def test_a_job_reads_what_was_named_here(elsewhere, words):
    """The job begins in the checkout: data in a preset's file or behind -p, folders in the
    environment, all are absolute.
    """
    here, calls = elsewhere
    done = CliRunner().invoke(main, ["submit", *words, "--run", "it", "-p", "output_dir=out"])
    assert done.exit_code == 0 and "pretrain: job 123\n" in done.output, done.output
    made = [json.loads(line) for line in calls.read_text().splitlines()]
    _, folder, given, environment = made[0]
    named = [word for word in given if word.startswith("data.sources=")][-1].partition("=")[2]
    assert (Path(folder) == ROOT and json.loads(named) == [str(here / "notes, 1.txt"), "synthetic"]
            and f"output_dir={here / 'out'}" in given)
    assert (environment["MODERN_LLM_DATA"] == str(here / "data")
            and environment["MODERN_LLM_RUNS"] == str(here / "out"))
    assert ([Path(word).is_absolute() for word in given if word.endswith("preset.json")]
            in ([], [True]))
    assert "--dependency=afterok:123" in made[1][2]
    shown = CliRunner().invoke(main, ["submit", *words, "--run", "other", "--dry-run"]).output
    assert (f"export MODERN_LLM_DATA='{here / 'data'}'" in shown
            and f"export MODERN_LLM_RUNS='{here / 'my runs'}'" in shown)


@fault
def test_start_and_baselines_are_absolute_too(elsewhere):
    from modern_llm.config import get_pipeline_preset, override, parse_overrides

    here, _ = elsewhere
    (here / "base").mkdir()
    settings = "start_from=base eval.baselines=base,gpt2 dpo.sources=synthetic"
    config = override(get_pipeline_preset("lesson"), parse_overrides(settings), "overrides")
    words = submit.absolute_words(
        ["overrides=eval.draws=3", "checkpoint=base", "checkpoint=gone", "seed=1"], config)
    assert words[:4] == ("overrides=eval.draws=3", f"checkpoint={here / 'base'}", "checkpoint=gone",
                         "seed=1")
    assert (words[4].startswith("overrides=eval.draws=3 ")
            and words[5] == f'eval.baselines=["{here / "base"}", "gpt2"]' and len(words) == 6)
    again = override(config, parse_overrides(words[4].partition("=")[2]), "overrides")
    assert again.start_from == str(here / "base") and again.eval.draws == 3


@fault
@pytest.mark.parametrize(
    "played, wanted",
    [({"code": 1, "err": "sbatch: error: Batch job submission failed: Invalid account\n"},
      "Invalid account"), ({"before": "Thank you\n"}, "gave no job number"),
     ({"before": "caf\xe9\n", "code": 1}, "sbatch refused")])
def test_a_refusal_in_sbatchs_own_words(elsewhere, play, played, wanted):
    play("sbatch", **played)
    done = CliRunner().invoke(main, ["submit", "--preset", "lesson", "--run", "it"])
    assert (done.exit_code == 2 and wanted in done.output and "Traceback" not in done.output
            and "Nothing is left in the queue" in done.output)


@fault
@pytest.mark.parametrize("words, code, wanted",
                         [(["--partition", "gpu,cpu"], 0, "--partition=gpu,cpu"),
                          (["--partition", "gpu,cup"], 2, "no partition 'cup'; did you mean 'cpu'"),
                          (["--run", "a", "-p", "run=b"], 0, "/a/logs/"),
                          (["-p", "preset=local-smoke"], 0, " local-smoke "),
                          (["-p", "output_dir=100%j"], 0, "100%%j/lesson/logs/%x-%j.out")])
def test_what_sbatch_takes_is_taken(elsewhere, play, words, code, wanted):
    play("sinfo", jobs=[{"P": "gpu*", "l": "2-00:00:00"}, {"P": "cpu", "l": "infinite"}])
    done = CliRunner().invoke(main, ["submit", "--preset", "lesson", "--stage", "pretrain",
                                     "--dry-run", *words])
    assert done.exit_code == code and wanted in done.output, done.output


@pytest.mark.fault("messages")
@pytest.mark.parametrize("words", [["status"], ["run", "--dry-run"], ["submit", "--dry-run"],
                                   ["sample", "--run", "x", "--prompt", "a"]])
@pytest.mark.parametrize(
    "place, wanted",
    [("~nobody-is-called-so/runs", "MODERN_LLM_RUNS='~nobody-is-called-so/runs' is not a folder"),
     ("/dev/null", "/dev/null")])
def test_a_place_for_runs_that_is_none(monkeypatch, words, place, wanted):
    monkeypatch.setenv("MODERN_LLM_RUNS", place)
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2 and wanted in done.output, done.output


# ---- status --------------------------------------------------------------------------------------

SOUND = {"stages": {"pretrain": {"status": "finished", "started": "2026-01-01T00:00:00+00:00",
                                 "seconds": 60.0}}}
STAGE = SOUND["stages"]["pretrain"]


def changed(**values) -> bytes:
    return json.dumps({"stages": {"pretrain": {**STAGE, **values}}}).encode()


@fault
@pytest.mark.parametrize(
    "content, why",
    [(b"", "is empty"), (b"\0" * 100, "zeros"), (b"{", "is not JSON"),
     (b"\xff\xfe{}", "is not UTF-8 text"), (b"[]", "not a JSON object"),
     (b"null", "JSON object"), (b"{}", "lacks 'stages'"),
     (b'{"stages": 5}', "stages=5"), (b'{"stages": {"pretrain": []}}', "pretrain holds []"),
     (b'{"stages": {"pretrain": {}}}', "lacks 'status'"),
     (changed(started=None), "started=null"), (changed(seconds="long"), "seconds="),
     (changed(status=["a"]), "status="), (b'{"stages": {}, "report": "x"}', "report holds"),
     (b'{"stages": {}, "report": {"path": 5}}', "path=5"), (b"[" * 100_000, "nested too deeply"),
     ("folder", "but a folder"), ("pipe", "is not a file"),
     ("link", "No such file"), ("socket", "is not a file")])
def test_a_damaged_run_hides_no_other(tmp_path, content, why):
    for name in ("one", "two", "zoo"):
        (tmp_path / name).mkdir()
    for name in ("one", "zoo"):
        (tmp_path / name / "run.json").write_text(json.dumps(SOUND))
    path = tmp_path / "two" / "run.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            os.chdir(tmp_path)
            made.bind("two/run.json")
    else:
        {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path),
         "link": lambda: path.symlink_to("gone")}[content]()
    done = CliRunner().invoke(main, ["status", "--output-dir", str(tmp_path)])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), done.output
    assert ("one  pretrain" in done.output and "zoo  pretrain" in done.output
            and "damaged: run.json" in done.output and why in done.output)
    assert CliRunner().invoke(main, ["status", "one", "--output-dir", str(tmp_path)]).exit_code == 0


@fault
@pytest.mark.parametrize(
    "place, content, why",
    [("pretrain/results.json", b"", "is empty"),
     ("pretrain/results.json", b'{"table": 5}', "no table of figures"),
     ("pretrain/results.json", b'{"table": [{"metric": "x", "value": "y"}]}', "results.json"),
     ("pretrain/results.json", b"[1]", "not a JSON object"),
     ("pretrain/results.json", b'{"table": [{"value": 1}]}', "no table of figures"),
     ("jobs/17.json", b"{", "jobs/17.json: is not JSON"), ("jobs/17.json", b'{"id": 5}', "id=5"),
     ("jobs/17.json", b'{"id": "5", "stages": "x"}', "stages=")])
def test_a_damaged_part_is_named_and_the_rest_shown(tmp_path, place, content, why):
    for name in ("one", "two"):
        (tmp_path / name / "pretrain").mkdir(parents=True)
        (tmp_path / name / "run.json").write_text(json.dumps(SOUND))
    (tmp_path / "two" / place).parent.mkdir(exist_ok=True)
    (tmp_path / "two" / place).write_bytes(content)
    done = CliRunner().invoke(main, ["status", "--output-dir", str(tmp_path)])
    assert (done.exit_code == 1 and "one  pretrain  finished" in done.output and why in done.output
            and "damaged" in done.output)


@fault
def test_odd_names_files_and_figures(tmp_path):
    """A file among the runs, a name with a new line, one that is not UTF-8, a link to nowhere, a
    NaN among the results, a lock of garbage.
    """
    (tmp_path / "a file").write_text("hello")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for name in (b"new\nline", b"caf\xe9", b"running", b"\x1b[31mred"):
        folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        (folder / "pretrain").mkdir(parents=True)
        (folder / "run.json").write_bytes(changed(status="running", pid="x", host=1))
        (folder / "pretrain" / "results.json").write_text(
            '{"table": [{"metric": "loss", "value": NaN}]}')
        (folder / locks.STAGE_LOCK).write_bytes(b'{"pid": "\xff')
    (tmp_path / "running" / locks.STAGE_LOCK).unlink()
    (tmp_path / "running" / locks.STAGE_LOCK).mkdir()
    done = CliRunner().invoke(main, ["status", "--output-dir", str(tmp_path)])
    lines = done.output.splitlines()
    assert (done.exit_code == 1 and len(lines) == 6 and "a link that leads nowhere" in done.output
            and "\x1b" not in done.output)
    assert ([line for line in lines if "new\\nline" in line]
            and sum("killed" in line and "loss nan" in line for line in lines) == 4)


def test_a_run_without_a_name_is_none(tmp_path):
    done = CliRunner().invoke(main, ["status", "", "--output-dir", str(tmp_path)])
    assert done.exit_code == 2 and f"no run '' in {tmp_path}" in done.output


@fault
@pytest.mark.parametrize("content", ["[]", "5", '{"pid": "x"}', '{"pid": 1}', "\0\0",
                                     '{"host": "a", "pid": 1}', "[" * 60_000])
def test_a_lock_of_garbage_is_nobodys(tmp_path, content):
    (tmp_path / locks.STAGE_LOCK).write_text(content)
    assert locks.owner_of(tmp_path) is None
    with locks.RunLock(tmp_path, "stage sft"):
        assert locks.owner_of(tmp_path)["what"] == "stage sft"


@fault
def test_a_mark_is_what_only_our_rows_have():
    assert (CommandOutput(0, f"x\n{MARK}a|b\n\x1b[0m{MARK}c|d|e\n{MARK}f\n", "").rows(2)
            == [["a", "b"], ["c", "d|e"]])
    assert runs_table(Path("/nowhere/at/all")) == []
