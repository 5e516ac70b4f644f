"""The job files on a real SLURM: a controller and two nodes on the loopback, the same files that go
to a cluster.

Jobs of several tests run side by side, so that the whole file takes about two minutes on two cores.
The durations that pytest prints are those of waiting.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from modern_llm.cli import main
from modern_llm.cluster import duration, submit
from modern_llm.cluster.jobs import jobs_of, note_job
from modern_llm.config import ALWAYS, get_pipeline_preset
from modern_llm.files import read_json, sha256
from modern_llm.tests.slurm import loopback

ROOT = Path(__file__).resolve().parents[2]
needs_slurm = pytest.mark.skipif(
    bool(loopback.missing()), reason=f"no SLURM here ({', '.join(loopback.missing())} missing): "
                                     "apt-get install slurm-wlm, or run on a cluster's login node")
SLOW = bool(os.environ.get("MODERN_LLM_SLOW_TESTS"))
THOROUGH = bool(os.environ.get("MODERN_LLM_THOROUGH_TESTS"))


def ask(*words: object) -> tuple[int, str]:
    """The exit code and the output of `modern-llm`, answered in this process."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


# ---- what needs no SLURM -------------------------------------------------------------------------


def test_an_estimate_is_assumed_then_measured(tmp_path):
    config = get_pipeline_preset("tacc-h100")
    assumed = duration.estimate(config, "pretrain", tmp_path, "H100 PCIe")
    # 253M parameters read 5.2B tokens: 6·N·D and the attention's share, at 30% of 756 TFLOP/s
    assert (6 * 253e6 * 5.24e9 / (0.3 * 756e12) / 60 < assumed.minutes
            < 1.3 * 6 * 253e6 * 5.24e9 / (0.3 * 756e12) / 60 + 15)
    assert assumed.steps == 40_000 and "assumed: 30% of 756 TFLOP/s" in assumed.why
    rows = [
        {"step": 20 * i, "tokens": 20 * i * 128 * 1024, "tokens_per_s": 64 * 1024.0 if i else None}
        for i in range(6)]
    # torn by a kill
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 12')
    measured = duration.estimate(config, "pretrain", tmp_path, "H100 PCIe")
    # two seconds per step
    assert measured.steps == 39_900 and measured.minutes == pytest.approx(39_900 * 2 / 60 + 15)
    assert measured.tokens_per_second == 64 * 1024 and "100 of 40,000 steps done" in measured.why
    limited = duration.estimate(get_pipeline_preset("h100-speedrun"), "pretrain",
                                tmp_path / "none", "H100")
    assert limited.minutes == 60 + 15 and "at most 60 min, a setting" in limited.why


@pytest.mark.parametrize("text, minutes", [("2-00:00:00", 2880), ("1-12:30:00", 2190),
                                           ("02:00:00", 120), ("30:00", 30), ("infinite", None)])
def test_limits_as_slurm_writes_them(text, minutes):
    assert submit.minutes_of(text) == minutes


def test_without_slurm_the_lines_are_shown_and_nothing_is_submitted(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    monkeypatch.setenv("MODERN_LLM_RUNS", str(tmp_path))
    code, text = ask("submit", "--preset", "tacc-h100", "--account", "PROJ", "-p",
                     "sft.weights=0.4,0.2,0.2,0.2", "--dry-run")
    lines = [line for line in text.splitlines() if line.startswith("JOB")]
    assert (code == 0
            and [re.search(r"slurm/(stage.slurm \w+|eval.slurm)", line)[1] for line in lines]
                == ["stage.slurm pretrain", "stage.slurm sft", "stage.slurm dpo",
                    "stage.slurm verifier", "eval.slurm"])
    assert "--dependency" not in lines[0] and all(f"--dependency=afterok:$JOB{i} " in line
                                                  for i, line in enumerate(lines[1:], 1))
    assert all("--account=PROJ --partition=gpu-h100" in line
               and "-p sft.weights=0.4,0.2,0.2,0.2" in line for line in lines)
    assert f"export MODERN_LLM_RUNS={tmp_path}" in text and not list(tmp_path.iterdir())
    code, text = ask("submit", "--preset", "local-smoke")
    assert (code == 2 and "sbatch is not here" in text and "--dry-run" in text
            and not list(tmp_path.iterdir()))
    assert ask("submit", "--preset", "tacc-h100", "--stage", "sftt", "--dry-run")[0] == 2


def test_prefetch_says_what_is_missing(monkeypatch):
    monkeypatch.delenv("MODERN_LLM_DATA", raising=False)
    assert ask("prefetch", "--preset", "local-smoke") == (0, "synthetic: here\n")
    code, text = ask("prefetch", "--preset", "tacc-h100")
    wanted = ["wikitext-103-raw-v1", "tinystories", "alpaca", "hh-rlhf", "gsm8k",
              "GPT-2's tokenizer", "distilgpt2"]
    assert code == 2 and all(f"{name}: " in text for name in wanted) and "are missing" in text


def test_prefetch_fetches_what_only_the_hub_has(tmp_path, monkeypatch):
    """What the hub could send is not here: compute nodes have no network."""
    (tmp_path / "gsm8k").mkdir()
    for split in ("train", "test"):
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text('{"question": "1?", "answer": "1"}\n')
    monkeypatch.setenv("MODERN_LLM_DATA", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "cache" / "tatsu-lab___alpaca" / "default").mkdir(parents=True)
    monkeypatch.setattr("modern_llm.data.sources.hub_reachable", lambda: True)
    monkeypatch.setattr("modern_llm.data.tokens.gpt2_tokenizer", object)
    monkeypatch.setattr("modern_llm.interchange.hub.find_model", lambda *given, **more: tmp_path)
    fetched = []
    monkeypatch.setattr("modern_llm.data.reading.download", fetched.append)
    code, text = ask("prefetch", "--preset", "tacc-h100")
    assert code == 0 and {"wikitext-103-raw-v1", "tinystories", "hh-rlhf"} <= set(fetched), text
    assert not {"gsm8k", "alpaca"} & set(fetched)
    assert "tinystories: fetched" in text and "gsm8k: here" in text and "alpaca: here" in text


def test_status_shows_jobs_that_nobody_can_ask_about(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    note_job(tmp_path / "big", "17", ["pretrain"], "sbatch …")
    code, text = ask("status", "--output-dir", tmp_path)
    assert code == 0 and re.search(r"big +pretrain +to do +17", text)


# ---- on the cluster ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A running SLURM and a folder for its runs; what a login shell would export is in the
    environment of this process.
    """
    place = tmp_path_factory.mktemp("cluster")
    runs = place / "runs"
    runs.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODERN_LLM_RUNS", str(runs))
        patch.setenv("MODERN_LLM_VENV", sys.prefix)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("MASTER_ADDR", "127.0.0.1")  # n1 and n2 are names to SLURM only
        patch.setenv("SLURM_CONF", str(loopback.start(place / "slurm")))
        patch.chdir(ROOT)
        try:
            yield runs
        finally:
            loopback.stop(place / "slurm")


def sbatch(*words: object) -> str:
    """Submit a job from the checkout; its number."""
    line = ["sbatch", "--parsable", f"--output={os.environ['MODERN_LLM_RUNS']}/%x-%j.out",
            *map(str, words)]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()


def slurm(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def seen(job: str) -> dict[str, str]:
    """What the controller says of a job."""
    return dict(re.findall(r"(\w+)=(\S+)", slurm("scontrol", "show", "job", "--oneliner", job)))


def until(claim, what: str, seconds: float = 600) -> None:
    """Wait until something is so."""
    deadline = time.time() + seconds
    while not claim():
        assert time.time() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)


def running_at(job: str, folder: Path, step: int) -> bool:
    """Whether a job runs and its stage has come to a step; an error if it has ended."""
    state = seen(job)["JobState"]
    assert state in ("PENDING", "RUNNING", "COMPLETING"), (
        f"job {job} is {state}\n{log(folder.parent)}")
    return state == "RUNNING" and steps(folder) >= step


def end_of(job: str) -> tuple[str, str]:
    """Wait for a job; its state and exit code."""
    until(lambda: seen(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"),
          f"job {job} to end")
    return seen(job)["JobState"], seen(job)["ExitCode"]


def steps(folder: Path) -> int:
    """The last step that a stage has logged."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"]
            for line in (folder / "metrics.jsonl").read_text().splitlines()]


def log(run: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(run.glob("logs/*.out")))


@pytest.fixture(scope="module")
def smoke(cluster):
    """The smoke job, submitted as it stands; it runs on one node while the other tests use the
    other one.
    """
    return sbatch("--nodelist=n1", "slurm/smoke.slurm", "slurm/smoke.json", "undisturbed")


# Where each preemption falls: one of them in short, three in the thorough variant; in the slow one
# a full run is compared, each stage preempted once.
PREEMPTED = ((("pretrain", 40), ("sft", 20), ("dpo", 10)) if SLOW
             else (("pretrain", 40), ("pretrain", 80), ("pretrain", 120)) if THOROUGH
             else (("pretrain", 60),))


@needs_slurm
def test_a_preempted_job_ends_with_the_same_weights(cluster, smoke):
    """By the warning that a limit gives, by hand, by a job of higher priority: each time it queues
    again and goes on.
    """
    run = cluster / "disturbed"
    job = sbatch("--nodelist=n2", "slurm/smoke.slurm", "slurm/smoke.json", "disturbed",
                 *([] if SLOW else ["--stage", "pretrain"]))
    ways = {"the warning USR1": lambda: slurm("scancel", "--batch", "--signal=USR1", job),
            "scontrol requeue": lambda: slurm("scontrol", "requeue", job),
            "a job of higher priority": lambda: sbatch("--partition=urgent", "--nodelist=n2",
                                                       "--exclusive", "--job-name=urgent",
                                                       "--wrap=sleep 1")}
    lines = []
    for number, ((stage, step), (way, preempt)) in enumerate(zip(PREEMPTED, ways.items()), 1):
        until(lambda: running_at(job, run / stage, step), f"{stage} to come to step {step}")
        lines.append(f"{stage}, behind step {steps(run / stage)}: {way}")
        preempt()
        until(lambda: seen(job)["Restarts"] == str(number), f"requeue number {number}")
    assert end_of(job) == ("COMPLETED", "0:0"), log(run)
    until(lambda: (cluster / "undisturbed" / PREEMPTED[-1][0] / "results.json").exists(),
          "the undisturbed run")
    for stage in dict.fromkeys(stage for stage, _ in PREEMPTED):
        weights = [sha256(cluster / name / stage / "checkpoint" / "model.safetensors")
                   for name in ("undisturbed", "disturbed")]
        lines.append(f"{stage}, sha256 of model.safetensors\n  undisturbed           "
                     f"{weights[0]}\n  preempted             {weights[1]}")
        assert weights[0] == weights[1]
    print("", *lines, sep="\n")
    assert "ended with code 75" in log(run) and f"start number {len(PREEMPTED) + 1}" in log(run)
    assert "ended with code 75" not in log(cluster / "undisturbed")


@needs_slurm
@pytest.mark.thorough
def test_a_job_at_its_time_limit_goes_on_and_a_cancelled_one_stays_away(cluster):
    run, stage = cluster / "limited", cluster / "limited" / "pretrain"
    # SLURM looks every half minute and warns up to that much early: here after 20 to 50 seconds
    job = sbatch("--time=1", "--signal=B:USR1@10", "--partition=main", "slurm/stage.slurm",
                 "pretrain", "slurm/smoke.json", "limited", "--max-steps", 100_000)
    until(lambda: seen(job)["Restarts"] == "1", "the warning before the limit of one minute")
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    reached = steps(stage)
    assert "USR1 from the scheduler" in log(run) and "ended with code 75" in log(run)
    until(lambda: running_at(job, stage, reached + 10), "the job to go on")
    slurm("scancel", job)
    assert end_of(job)[0] == "CANCELLED" and log(run).count("start number") == 2
    assert read_json(run / "run.json")["stages"]["pretrain"]["status"] == "preempted", (
        "cancelled with a checkpoint")


@needs_slurm
def test_a_chain_stops_where_a_stage_fails(cluster):
    """Each job of `modern-llm submit` waits for the one before; a failure shows in its log, its
    exit code, and the stages behind it.
    """
    words = ["submit", "--preset", "slurm/smoke.json", "--run", "chain", "-p",
             "pretrain.max_steps=4", "-p", "pretrain.log_every=1", "-p", "sft.lr=1e9", "-p",
             "sft.muon_lr=1e9"]
    code, text = ask(*words, "--partition", "mian")
    assert (code == 2 and "no partition 'mian'; did you mean 'main'" in text
            and "gpu-h100, gpu-a100, urgent" in text)
    code, text = ask(*words, "--time", "tomorrow")
    assert (code == 2 and "'tomorrow'" in text and "days-hours" in text
            and not jobs_of(cluster / "chain"))
    code, text = ask(*words)
    assert code == 0, text
    jobs = {record["stages"][0]: record["id"] for record in jobs_of(cluster / "chain")}
    assert list(jobs) == ["pretrain", "sft", "dpo", "verifier", "eval"]
    code, text = ask(*words)
    assert code == 2 and "in the queue already" in text and f"scancel {jobs['pretrain']}" in text
    code, text = ask("status", "chain")
    assert (code == 0
            and re.search(rf"chain +dpo +to do +{jobs['dpo']} PENDING \(Dependency\)", text))
    assert end_of(jobs["pretrain"]) == ("COMPLETED", "0:0")
    assert end_of(jobs["sft"]) == ("FAILED", "1:0") and end_of(jobs["eval"])[0] == "CANCELLED"
    failed = (cluster / "chain" / "logs" / f"sft-{jobs['sft']}.out").read_text()
    assert ("diverged by step" in failed and "sft: failed; the notebook with its error is" in failed
            and "ended with code 1" in failed)
    code, text = ask("status", "chain")
    assert (re.search(rf"pretrain +finished +{jobs['pretrain']} COMPLETED", text)
            and re.search(rf"sft +failed +{jobs['sft']} FAILED", text))
    assert re.search(rf"dpo +to do +{jobs['dpo']} CANCELLED", text)


FOUR_STEPS = ("-p", "pretrain.max_steps=4", "-p", "pretrain.log_every=1", "-p", "pretrain.lr=1e-3")


@pytest.fixture(scope="module")
def rates(cluster, tmp_path_factory):
    """An array of two jobs; the first is also the one process that two nodes are compared with, and
    runs beside them.
    """
    sweep = tmp_path_factory.mktemp("array") / "sweep.txt"
    sweep.write_text(f"--stage pretrain {' '.join(FOUR_STEPS)}\n"
                     "--stage pretrain --max-steps 2 -p pretrain.lr=2e-3\n")
    return sbatch("--array=1-2", "--partition=main", "slurm/array.slurm", "slurm/smoke.json",
                  "rate", sweep)


def array_to_end(job: str) -> None:
    until(lambda: not slurm("squeue", "-h", "-j", job), "the array to end")


@needs_slurm
@pytest.mark.parametrize("launcher, tasks, ranks", [
    ("srun", 1, 2), pytest.param("torchrun", 2, 4, marks=pytest.mark.thorough)])
def test_two_nodes_train_as_one(cluster, rates, launcher, tasks, ranks):
    """On each of two nodes a rank started by srun, or two by srun torchrun: the losses of one
    process.
    """
    run = cluster / launcher
    job = sbatch("--nodes=2", f"--ntasks-per-node={tasks}", "--partition=main",
                 f"--export=ALL,MODERN_LLM_LAUNCHER={launcher}", "slurm/stage.slurm", "pretrain",
                 "slurm/smoke.json", launcher, *FOUR_STEPS)
    assert end_of(job) == ("COMPLETED", "0:0"), log(run)
    assert (seen(job)["NodeList"] == "n[1-2]"
            and read_json(run / "run.json")["config"]["hardware"]["ranks"] == ranks)
    array_to_end(rates)
    one, several = (losses(cluster / name / "pretrain") for name in ("rate-1", launcher))
    assert len(one) == 4 and several == pytest.approx(one, rel=1e-6)


@needs_slurm
@pytest.mark.skipif(not SLOW, reason="takes a minute: set MODERN_LLM_SLOW_TESTS=1")
def test_two_nodes_of_torchrun_go_on_exactly_and_die_together(cluster):
    """Warned once and requeued once, four ranks on two nodes end in the weights of four undisturbed
    ones; a killed one takes all along.
    """
    def submitted(name: str, steps: int) -> tuple[str, Path]:
        return sbatch("--nodes=2", "--ntasks-per-node=2",
                      "--export=ALL,MODERN_LLM_LAUNCHER=torchrun", "--partition=main",
                      "slurm/stage.slurm", "pretrain", "slurm/smoke.json", name, "-p",
                      f"pretrain.max_steps={steps}", "-p", "pretrain.log_every=1"), cluster / name

    _, alone = submitted("four", 200)
    job, run = submitted("four-disturbed", 200)
    ways = ((lambda: slurm("scancel", "--batch", "--signal=USR1", job)),
            (lambda: slurm("scontrol", "requeue", job)))
    for number, (step, preempt) in enumerate(zip((40, 100), ways), 1):
        until(lambda: running_at(job, run / "pretrain", step), f"step {step}")
        preempt()
        until(lambda: seen(job)["Restarts"] == str(number), f"requeue number {number}")
    assert end_of(job) == ("COMPLETED", "0:0"), log(run)
    weights = [sha256(folder / "pretrain" / "checkpoint" / "model.safetensors")
               for folder in (alone, run)]
    assert (weights[0] == weights[1] and "ended with code 75" in log(run)
            and "start number 3" in log(run))

    job, run = submitted("four-killed", 100_000)
    until(lambda: running_at(job, run / "pretrain", 5), "the first steps")
    ranks = [each for each in psutil.process_iter(["cmdline"])
             if "modern_llm.cli import main" in " ".join(each.info["cmdline"] or ())
                and each.environ().get("SLURM_JOB_ID") == job]
    assert (sorted((each.environ()["SLURM_NODEID"], each.environ()["LOCAL_RANK"]) for each in ranks)
            == [(n, i) for n in "01" for i in "01"])
    next(each for each in ranks if each.environ()["RANK"] == "3").kill()
    assert (end_of(job)[0] == "FAILED" and "another rank is gone" in log(run)
            and log(run).count("Exception encountered") == 1), log(run)
    assert (read_json(run / "run.json")["stages"]["pretrain"]["status"] == "failed"
            and "Preempted" not in log(run))


@needs_slurm
def test_an_array_makes_a_run_of_every_line(cluster, rates):
    array_to_end(rates)
    for number in (1, 2):
        folder = cluster / f"rate-{number}"
        params = read_json(folder / "pretrain" / "params.json")
        assert (params["config"]["pretrain"]["lr"] == number * 1e-3
                and (folder / "pretrain" / "results.json").exists())
        assert len(list((folder / "logs").glob(f"array-{rates}_{number}.out"))) == 1


@needs_slurm
def test_the_smoke_job_runs_every_stage(cluster, smoke):
    assert end_of(smoke) == ("COMPLETED", "0:0"), log(cluster / "undisturbed")
    record = read_json(cluster / "undisturbed" / "run.json")
    assert ({name: entry["status"] for name, entry in record["stages"].items()}
            == dict.fromkeys(ALWAYS, "finished"))
    assert ((cluster / f"smoke-{smoke}.out").read_text()
            == f"log: {cluster}/undisturbed/logs/smoke-{smoke}.out\n")
    report = Path(record["report"]["path"])
    report.unlink()
    again = sbatch("--partition=main", "slurm/eval.slurm", "slurm/smoke.json", "undisturbed")
    assert end_of(again) == ("COMPLETED", "0:0") and report.exists()
    assert "eval: skipped" in log(cluster / "undisturbed")


@needs_slurm
def test_a_job_file_says_what_it_lacks(cluster, monkeypatch):
    monkeypatch.setenv("MODERN_LLM_VENV", "/nowhere")
    monkeypatch.setenv("PATH",
                       os.pathsep.join(place for place in os.environ["PATH"].split(os.pathsep)
                                       if not (Path(place) / "modern-llm").exists()))
    without, outside = sbatch("slurm/smoke.slurm"), sbatch("--chdir=/", "slurm/smoke.slurm")
    assert (end_of(without) == ("FAILED", "2:0")
            and "run bash scripts/environment.sh" in (cluster / f"smoke-{without}.out").read_text())
    assert (end_of(outside)[0] == "FAILED"
            and "slurm/job.sh" in (cluster / f"smoke-{outside}.out").read_text())
