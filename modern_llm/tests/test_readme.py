"""Every command of README.md and of the guides (nbs/7*.ipynb) is executed in a copy of the
checkout; a command that has no case here fails.

What would take long gets more words that make it short; paths that stand for the reader's own
become small real ones; what another test executes is named with it. The commands run in three lanes
side by side, and each test waits for its own.
"""

import ast
import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from modern_llm.data import synth
from modern_llm.tests.slurm import loopback

ROOT = Path(__file__).resolve().parents[2]


def page(path: Path) -> str:
    """What a reader sees of a notebook but its code: the text, and what the cells put into it."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = [cell["source"] if cell["cell_type"] == "markdown" else output["data"]["text/markdown"]
             for cell in cells for output in cell.get("outputs", [{}])
             if cell["cell_type"] == "markdown" or "text/markdown" in output.get("data", {})]
    return "\n\n".join(map("".join, parts))


README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = {path: page(path) for path in sorted((ROOT / "nbs").glob("7*.ipynb"))}
HOME = "https://github.com/modern-llm/modern_llm.git"
CLONE = f"git clone {HOME} && cd modern_llm"
ACTIVATE, CLUSTER = ("source .venv/bin/activate",
                     "source slurm/environment.sh && bash scripts/environment.sh")
# Where there is a SLURM, its smoke job runs every stage (test_slurm.py); then the first command
# stops here after pretraining, and the policy that others need is tuned from there.
# MODERN_LLM_SLOW_TESTS=1 runs every stage here, as a machine without SLURM does.
EVERY_STAGE = bool(loopback.missing() or os.environ.get("MODERN_LLM_SLOW_TESTS"))
TINY = ("data.max_train_tokens=20000 data.max_validation_tokens=2000 model.width=32 "
        "model.num_layers=1 model.num_heads=2 model.num_kv_heads=1 "
        "model.ffn_width=64 pretrain.max_steps=3 pretrain.batch_size=4 pretrain.micro_batch_size=2")
SHORT = ("sft.max_steps=3 sft.batch_size=4 sft.max_train_examples=60 sft.max_validation_examples=4 "
         "dpo.max_steps=3 dpo.batch_size=2 dpo.max_train_pairs=20 dpo.max_validation_pairs=4 "
         "dpo.max_new_tokens=8 verifier.max_steps=2 verifier.batch_size=4 "
         "verifier.train_problems=6 verifier.validation_problems=4 verifier.samples_per_problem=2 "
         "verifier.validation_samples=16 verifier.gold_problems=50 verifier.max_new_tokens=8")
FEW = (
    "eval.num_problems=5 eval.sampled_problems=3 eval.samples_per_problem=2 eval.max_new_tokens=8 "
    "eval.num_sentences=6 eval.shots=0 eval.draws=1 eval.num_instructions=6 eval.num_pairs=6 "
    "eval.max_perplexity_tokens=1000 eval.protocol_tokens=400 eval.overlap_documents=50")
BUILT_IN = ("data.sources=synthetic sft.sources=synthetic sft.weights=1 dpo.sources=synthetic "
            "verifier.problems=synthetic eval.problems=synthetic eval.sentiment=synthetic "
            "eval.protocol_sources=text eval.baselines=")


def settings(*texts: str) -> str:
    return f"-p 'overrides={' '.join(texts)}'"


@dataclass(frozen=True)
class Case:
    """How a command is executed: with `more` words behind it; its exit code, what it must say and
    what it must leave behind.
    """

    more: str = ""
    says: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    typed: str = ""
    code: int = 0
    lane: str = "beside"
    beside: str = "modern_llm"  # the folder where it is typed, next to the reader's data
    slurm: bool = False


@dataclass(frozen=True)
class Elsewhere:
    """A command that another test executes; here it is asked what it does: make, by its recipe;
    papermill, by the notebook's parameters.
    """

    test: str
    recipe: str = ""


SPEEDRUN = Case(settings(TINY, SHORT, FEW), ("sft: finished", "attention: finished", "7 stages in"),
                lane="run",
                leaves=("runs/local-smoke/pretrain/notebook.ipynb",
                        "runs/local-smoke/verifier/results.json", "report/local-smoke_report.md"))
if not EVERY_STAGE:
    tune = (".venv/bin/modern-llm run --run local-smoke --stage dpo --checkpoint "
            f"runs/local-smoke/pretrain {settings(TINY, SHORT)}")
    SPEEDRUN = Case(f"{SPEEDRUN.more} --stage pretrain && {tune}",
                    ("pretrain: finished", "dpo: finished"), SPEEDRUN.leaves[:1], lane="run")

CASES = {
    CLONE: Case("&& ls", ("README.md", "speedrun.sh"), beside="fresh", lane="clone"),
    "bash speedrun.sh local-smoke": SPEEDRUN,
    "make test": Elsewhere("test_readme.py", ".venv/bin/python -m pytest"),
    ACTIVATE: Case("&& command -v modern-llm papermill", ("bin/modern-llm\n", "bin/papermill\n")),
    "make lab": Elsewhere("test_jupyterlab.py", "jupyter lab --notebook-dir="),
    "modern-llm practice 01_attention": Case("", ("17 definitions to write: attention_weights",),
                                            ("practice/01_attention.ipynb",)),
    "modern-llm doctor": Case("--quick", ("local-smoke  ", "local-smoke can run: modern-llm run")),
    "make docs": Elsewhere("test_docs.py", ".venv/bin/python docs/build.py"),
    "modern-llm status": Case("", ("local-smoke", "pretrain", "finished", "bits per byte"),
                              lane="run"),
    "modern-llm chat --run local-smoke": Case("--max-new-tokens 4", ("runs/local-smoke/dpo",),
                                              typed="What is 3 plus 4?\n/quit\n", lane="run"),
    'modern-llm score --run local-smoke "Tom has 3 hats and buys 4 hats. How many hats?" '
    '"Tom has 3+4=<<3+4=7>>7 hats. #### 7" "Tom has 3+4=<<3+4=9>>9 hats. #### 9"': Case(
        "", ("rank", "answer 2: 0.") if EVERY_STAGE else ("has no verifier",),
        code=0 if EVERY_STAGE else 2, lane="run"),
    "modern-llm checkpoints local-smoke/pretrain": Case(
        "--max-new-tokens 4 --max-tokens 500", ("bits per byte, text", "written: "),
        ("runs/local-smoke/pretrain-checkpoints/checkpoints.csv",), lane="run"),
    "modern-llm compare local-smoke/sft local-smoke/dpo": Case(
        "", ("dpo  instructions" if EVERY_STAGE else "has no eval/items.csv: evaluate it first",),
        code=0 if EVERY_STAGE else 2, lane="run"),
    "modern-llm serve --run local-smoke": Case(
        "--port 0 > serving.txt 2>&1 & until grep http:// serving.txt || ! kill -0 $!; do sleep "
        "0.2; done; kill $! && wait $!", ("local-smoke: pretrain, ", "at http://127.0.0.1:"),
        lane="run"),
    "modern-llm sample --run local-smoke --stage pretrain --max-new-tokens 1000 --streaming": Case(
        "-n 1", ("runs/local-smoke/pretrain", "---"), lane="run"),
    "modern-llm attention-page local-smoke": Case("", ("attention.html",), ("attention.html",),
                                                  lane="run"),
    "modern-llm presets": Case("", ("local-smoke", "tacc-h100")),
    "modern-llm run --stage pretrain --run sinks -p model.use_attention_sinks=true -p "
    "hardware.ranks=2": Case(" ".join(f"-p {setting}" for setting in TINY.split()),
                             ("pretrain: finished",),
                             ("runs/sinks/pretrain/checkpoint/model.safetensors",)),
    "papermill nbs/03_pretrain.ipynb out.ipynb -p preset tacc-h100": Case(
        f"-p device cpu -p overrides '{TINY} model.context_length=64 data.sources=synthetic "
        "data.tokenizer=bpe data.tokenizer_vocab_size=300 pretrain.compile=false'",
        leaves=("out.ipynb", "runs/tacc-h100/pretrain/results.json")),
    "export MODERN_LLM_DATA=/path/to/data": Case(
        "&& modern-llm datasets tinystories wikitext-2-raw-v1", ("tinystories", "mirror")),
    "modern-llm run --preset local-cpu --stage pretrain --run ten-minutes -p max_minutes=10": Case(
        settings(TINY, "data.tokenizer_vocab_size=300 pretrain.compile=false"),
        ("perplexity, tinystories", "perplexity, wikitext-2-raw-v1")),
    "modern-llm run --preset local-cpu --stage eval --run other --checkpoint "
    "/path/to/SmolLM2-135M-Instruct": Case(
        settings(FEW, BUILT_IN, "eval.protocol_sources=tinystories"),
        ("eval: finished",), ("runs/other/eval/ledger.csv",), lane="run"),
    "papermill nbs/50_eval_speed.ipynb labels.ipynb -p checkpoint /path/to/SmolLM2-135M-Instruct "
    "-p rounds 2 -p sentiment sst2 -p sentences 872 -p problems 0": Elsewhere("test_notebooks.py"),
    "papermill nbs/50_eval_speed.ipynb answers.ipynb -p checkpoint /path/to/SmolLM2-135M-Instruct "
    "-p sentences 0 -p word_problems gsm8k "
    "-p problems 64 -p samples 16 -p new_tokens 128": Elsewhere("test_notebooks.py"),
    "python -m modern_llm.tests.faults": Case("--help", ("usage: python -m modern_llm.tests.faults",
                                                         "--only")),  # with faults: test_faults.py
    "python scripts/figures.py": Case("", leaves=("report/figures/pipeline.svg",
                                                  "report/figures/overview.svg")),
    "make export": Elsewhere("test_project.py", "nbdev_export"),
    "modern-llm export --run local-smoke --stage dpo --to my-model --dtype bf16": Case(
        "", leaves=("my-model/README.md", "my-model/model.safetensors"), lane="run"),
    "modern-llm check-inference --checkpoint runs/local-smoke/dpo": Case(
        "--count 2 --max-new-tokens 4", ("GB",), ("runs/local-smoke/dpo/inference_ok.json",),
        lane="run"),
    "modern-llm capsule local-smoke": Case(
        "", ("without weights; its report was ", "sha256 "), ("local-smoke.capsule.zip",),
        lane="run"),
    "modern-llm capsule local-smoke.capsule.zip --check": Case(
        "", ("each as in its manifest", "equal byte for byte"), lane="run"),
    "modern-llm bench --device cpu --minutes 1": Case(
        "--minutes 0.1", ("matrix fp32: ", "left out; bench"), ("bench/bench.json",)),
    CLUSTER: Case("&& command -v modern-llm && echo runs: $MODERN_LLM_RUNS",
                  ("bin/modern-llm\n", "/scratch/modern_llm/runs"), lane="cluster"),
    "modern-llm prefetch --preset tacc-h100": Case("", ("wikitext-103-raw-v1: ", "are missing"),
                                                   code=2, lane="cluster"),  # offline
    "sbatch -A PROJECT slurm/smoke.slurm": Case("", ("Submitted batch job",), lane="cluster",
                                                slurm=True),  # to its end: test_slurm.py
    "modern-llm submit --preset tacc-h100 --account PROJECT --dry-run": Case(
        "", ("assumed", "slurm/stage.slurm pretrain tacc-h100", "--dependency=afterok:$JOB1"),
        lane="cluster"),
    "modern-llm submit --preset tacc-h100 --account PROJECT": Case(
        settings(BUILT_IN, "data.tokenizer=bpe"),
        ("verifier: job", "`modern-llm status tacc-h100`"), lane="cluster", slurm=True),
    "modern-llm status tacc-h100": Case("", ("pretrain", "PENDING ("), lane="cluster", slurm=True),
}


def commands() -> dict[str, str]:
    """Every command in a bash block of README.md and the guides, and the lines that must come
    before it: what its block sets, or the activation.
    """
    found, shown = {}, "\n\n".join([README, *GUIDES.values()])
    for number, block in enumerate(re.findall(r"^```bash\n(.*?)^```", shown, re.S | re.M)):
        lines = [re.sub(r"(^|\s+)# .*", "", line)
                 for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
        before = [ACTIVATE] if number and not any("source" in line for line in lines) else []
        for line in filter(None, lines):
            found.setdefault(line, "\n".join(before))
            if line.startswith(("source ", "export ")):
                before.append(line)
    return found


def test_every_command_has_a_case_and_every_case_a_command():
    assert set(commands()) == set(CASES) and len(CASES) > 20


def test_every_link_leads_somewhere():
    found = {}
    for folder, text in ((ROOT, README), *((path.parent, text) for path, text in GUIDES.items())):
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            found[link] = (folder / link.split("#")[0]).resolve()
    lost = [link for link, path in found.items()
            if not link.startswith("https://arxiv.org/abs/") and not path.is_file()]
    assert len(found) > 90 and lost == []
    assert set((ROOT / "nbs").glob("*.ipynb")) <= {ROOT / "nbs/index.ipynb", *found.values()}, (
        "every chapter is in a list")


def test_the_front_page_is_short():
    """Two minutes of reading, and a transcript that a phone shows without folding it."""
    assert len(README.split()) <= 900
    transcript, = re.findall(r"^```text\n(.*?)^```", README, re.S | re.M)
    assert max(map(len, transcript.splitlines())) <= 42


def test_the_share_of_a_gpu_is_the_published_one():
    """Of the best step of the ladder, which chapter 52 discusses."""
    lines = pd.read_csv(ROOT / "report/results/h200/lines.csv")
    assert f"reaches {lines.mfu.max():.0%} MFU" in " ".join(README.split())


def test_the_table_shows_the_lines_of_the_package():
    """Each line of code in the table of the architecture is one of the definition linked beside it,
    in its order.
    """
    rows = re.findall(r"^\| \*\*\[\w+\]\((\S+)#L(\d+)\).* \| (.+) \|$", README, re.M)
    assert len(rows) == 4
    for path, line, shown in rows:
        text = (ROOT / path).read_text(encoding="utf-8")
        part, = (node for node in ast.parse(text).body if node.lineno == int(line))
        lines = iter([row.strip() for row in text.splitlines()[part.lineno - 1:part.end_lineno]])
        code = re.findall(r"`([^`]+)`", shown)
        assert code and all(row in lines for row in code), f"{path}#{part.name}: {code}"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout whose .venv is that of these tests, data and a model as a reader has
    them, and the environment for it.
    """
    if not (Path(sys.prefix) / "bin" / "activate").is_file():
        pytest.skip("these are the commands of a checkout with a .venv: make test")
    place = tmp_path_factory.mktemp("readme")
    checkout = place / "modern_llm"
    ignored = shutil.ignore_patterns(".*", "_docs", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, checkout, ignore=lambda folder, names: (  # modern_llm/runs is needed
        ignored(folder, names) | ({"runs"} if Path(folder) == ROOT else set())))
    (place / "fresh").mkdir()
    (checkout / ".venv").symlink_to(sys.prefix)
    wanted = subprocess.run("cat settings.ini setup.py constraints.txt | cksum", shell=True,
                            cwd=checkout, capture_output=True, text=True).stdout
    stamp = checkout / ".venv" / ".installed"
    if not stamp.is_file() or stamp.read_text() != wanted:
        pytest.skip(
            "the environment is not what settings.ini asks for: bash scripts/environment.sh")
    stories = [item.text for item, _ in zip(synth.documents(), range(400))]
    (place / "data" / "tinystories").mkdir(parents=True)
    (place / "data" / "wikitext2").mkdir()
    (place / "data" / "tinystories" / "train.jsonl").write_text("".join(
        json.dumps({"text": text}) + "\n" for text in stories))
    for split, part in (("train", stories), ("valid", stories[:40])):
        article = "".join(f" = Story {number} = \n \n {text} \n"
                          for number, text in enumerate(part))
        (place / "data" / "wikitext2" / f"{split}.txt.gz").write_bytes(gzip.compress(
            article.encode()))
    # skips where there is no transformers
    from modern_llm.tests.test_hub import other_tokenizer, written

    written(place / "model", max_position_embeddings=1024, vocab_size=640)
    other_tokenizer(stories, 600).save(str(place / "model" / "tokenizer.json"))
    path = [folder for folder in os.environ["PATH"].split(os.pathsep)
            if not (Path(folder) / "modern-llm").exists()]
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith(("MODERN_LLM_", "VIRTUAL_ENV"))}
    git = {f"url.{ROOT}.insteadOf": HOME, "safe.directory": "*"}  # the clone is of this checkout
    for number, (key, value) in enumerate(git.items()):
        kept |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    return checkout, {**kept, "PATH": os.pathsep.join(path), "GIT_CONFIG_COUNT": str(len(git)),
                      "PYTHONPATH": os.pathsep.join([str(checkout), kept.get("PYTHONPATH", "")]),
                      "OMP_NUM_THREADS": "1", "MODERN_LLM_CACHE": str(place / "cache"),
                      "HF_HOME": str(place / "huggingface")}


@pytest.fixture(scope="module")
def cluster(checkout, tmp_path_factory):
    """The environment of a login node: a SLURM, where there is one, whose nodes are drained, so
    that jobs stay in the queue.
    """
    place = tmp_path_factory.mktemp("cluster")
    login = {**checkout[1], "SCRATCH": str(place / "scratch")}
    if not loopback.missing():
        login["SLURM_CONF"] = str(loopback.start(place / "slurm"))
        drain = ["scontrol", "update", "NodeName=n1,n2", "State=DRAIN", "Reason=test"]
        subprocess.run([loopback.program(drain[0]), *drain[1:]], env=login, check=True)
    yield login
    if not loopback.missing():
        loopback.stop(place / "slurm")


@pytest.fixture(scope="module")
def done(checkout, cluster):
    """Command -> its process when it has ended. Lanes run side by side, the commands of a lane in
    the pages' order.
    """
    folder, env = checkout

    def execute(line: str, before: str) -> subprocess.CompletedProcess:
        case = CASES[line]
        text = f"set -euo pipefail\n{before}\n{line} {case.more}"
        for name, real in (("/path/to/data", "data"), ("/path/to/SmolLM2-135M-Instruct", "model")):
            text = text.replace(name, str(folder.parent / real))
        return subprocess.run(["bash", "-c", text], cwd=folder.parent / case.beside,
                              env=cluster if case.lane == "cluster" else env, text=True,
                              input=case.typed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              timeout=900)

    lanes = {case.lane: ThreadPoolExecutor(1) for case in CASES.values() if isinstance(case, Case)}
    here = {line: CASES[line] for line in commands() if isinstance(CASES.get(line), Case)}
    yield {line: lanes[case.lane].submit(execute, line, commands()[line])
           for line, case in here.items() if not (case.slurm and loopback.missing())}
    for lane in lanes.values():
        lane.shutdown(cancel_futures=True)


@pytest.mark.parametrize("line", [line for line, case in CASES.items() if isinstance(case, Case)])
def test_a_command_does_what_it_says(line, checkout, done):
    case = CASES[line]
    if case.slurm and loopback.missing():
        pytest.skip(
            f"no SLURM here ({', '.join(loopback.missing())} missing): apt-get install slurm-wlm")
    if line == CLONE and not (ROOT / ".git").exists():
        pytest.skip("this checkout is no clone")
    ended = done[line].result()
    assert ended.returncode == case.code, ended.stdout
    assert [words for words in case.says if words not in ended.stdout] == [], ended.stdout
    assert [name for name in case.leaves if not (checkout[0] / name).is_file()] == [], ended.stdout


def test_jobs_wait_in_the_queue(done, cluster):
    """The smoke job, and the chain: each behind the one before, all under the account that was
    asked for.
    """
    if loopback.missing():
        pytest.skip(
            f"no SLURM here ({', '.join(loopback.missing())} missing): apt-get install slurm-wlm")
    done["modern-llm status tacc-h100"].result()
    rows = subprocess.run([loopback.program("squeue"), "-h", "-S", "i", "-o", "%j %a %E"],
                          env=cluster, capture_output=True, text=True).stdout
    jobs = [row.split() for row in rows.splitlines()]
    assert ([job[0] for job in jobs] == ["smoke", "pretrain", "sft", "dpo", "verifier", "eval"]
            and {job[1] for job in jobs} == {"project"})
    assert all(job[2].startswith("afterok:") for job in jobs[2:])


@pytest.mark.parametrize(
    "line", [line for line, case in CASES.items() if isinstance(case, Elsewhere)])
def test_a_command_that_another_test_executes(line, checkout):
    assert (Path(__file__).parent / CASES[line].test).is_file()
    if line.startswith("make "):
        recipe = subprocess.run(["make", "-n", line.split()[1]], cwd=checkout[0],
                                env=checkout[1], check=True, capture_output=True, text=True).stdout
        assert "bash scripts/environment.sh" in recipe and CASES[line].recipe in recipe
        return
    words = shlex.split(line)
    cells = json.loads((ROOT / words[1]).read_text(encoding="utf-8"))["cells"]
    declared, = ("".join(cell["source"]) for cell in cells
                 if "parameters" in cell["metadata"].get("tags", []))
    given = [words[place + 1] for place, word in enumerate(words) if word == "-p"]
    assert (words[0] == "papermill" and given
            and all(re.search(rf"^{name} = ", declared, re.M) for name in given))
