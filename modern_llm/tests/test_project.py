"""The project's own rules: notebooks and package in step, imports in order, documents true."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "modern_llm"

# What each module may import of the package. A module that is not listed may import nothing of it.
ALLOWED = {
    "ranks": {"config", "files", "distributed", "launch"}, "launch": {"inputs"}, "distributed": {"checkpoints", "config", "optim", "ranks"},
    "config": {"presets"},  # looked up when asked for
    "overrides": {"config"}, "presets": {"config", "overrides"}, "files": set(), "figures": set(), "marking": set(),
    "synth_problems": {"marking"}, "synth_world": {"synth_problems"}, "synth": {"marking", "synth_problems", "synth_world"},
    "layers": set(),
    "attention": {"layers", "config"},
    "counts": {"config"},
    "generation": {"attention", "config", "models"},  # the model as a type only
    "models": {"layers", "attention", "config", "files", "overrides"},
    "scoring": set(),
    "held_out": {"reading", "sources", "splits", "tokens"},
    "perplexity": {"generation", "held_out", "scoring", "sources", "tokens"},
    "overlap": {"config", "reading", "scoring", "sources", "synth"},
    "sources": {"config"},
    "splits": {"config", "sources"},
    "formats": {"sources"},
    "reading": {"config", "files", "formats", "sources", "splits", "synth"},
    "tokens": {"config", "files", "sources", "reading", "templates"},
    "data": {"config", "files", "sources", "reading", "tokens", "synth"},
    "optim": {"config"},
    "checkpoints": {"config", "files", "optim"},
    "templates": {"files"},
    "chat": {"data", "files", "generation", "models", "templates", "tokens"},  # the model as a type only
    "tasks": {"chat", "config", "marking", "models", "reading", "scoring", "synth", "tokens"},
    "pairs": {"chat", "config", "optim", "reading", "synth", "tokens"},
    "dpo": {"chat", "config", "files", "generation", "models", "optim", "pairs", "reading", "scoring", "synth", "tasks", "tokens"},
    "prefix": {"generation"},
    "fewshot": {"prefix", "scoring", "synth", "tokens"},
    "train_step": {"checkpoints", "config", "distributed", "optim"},
    "trainer": {"checkpoints", "config", "distributed", "optim", "train_step"},
    "ledger": {"files", "scoring"},
    "evals": {"chat", "data", "fewshot", "files", "hub", "ledger", "perplexity", "prefix", "scoring", "tasks", "tokens"},
    "sft": {"chat", "config", "data", "models", "reading", "scoring", "sources", "synth", "tasks", "tokens"},
    "inputs": {"config", "files", "hub", "overrides", "reading", "sources", "tokens"},
    "foreign": {"attention"}, "llama_layout": {"config", "files", "models"},
    "hub": {"chat", "files", "foreign", "inputs", "llama_layout", "models", "sources", "templates", "tokens"},
    "export": {"chat", "config", "counts", "files", "inputs", "models", "report_eval", "report_page", "sources", "tokens"},
    "inference": {"chat", "checkpoints", "config", "counts", "files", "generation", "inputs", "models", "scoring", "tasks", "tokens"},
    "attention_viz": {"attention", "figures", "models", "synth_world"},  # the model as a type only
    "report_figures": {"figures"}, "report_page": {"config", "files"}, "report_seeds": {"report_page"},
    "report": {"config", "counts", "files", "overrides", "report_eval", "report_figures", "report_page", "report_seeds"},
    "report_eval": {"report_figures", "report_page"},
    "bases": {"config", "files", "inputs", "launch", "tokens"}, "locks": {"inputs", "scheduler"}, "scheduler": {"inputs"},
    "parameters": {"config", "inputs", "locks", "overrides", "presets", "resume"}, "resume": {"config", "inputs"},
    "preflight": {"checkpoints", "config", "counts", "inputs"},
    "record": {"config", "files", "inputs", "locks", "overrides", "parameters", "preflight", "ranks"},
    "stage": {"bases", "checkpoints", "config", "counts", "distributed", "files", "inputs", "locks", "models", "overrides", "parameters", "preflight",
              "ranks", "record", "resume"},
    "answer_pairs": {"chat", "config", "tasks", "tokens"},
    "verifier": {"answer_pairs", "chat", "config", "files", "generation", "models", "optim", "scoring", "tasks", "tokens"},
    "pipeline": {"config", "files", "inputs", "launch", "locks", "overrides", "parameters", "presets", "record", "report", "resume", "scheduler"},
    "outcomes": {"files", "inputs", "locks", "pipeline"},
    "talk": {"chat", "checkpoints", "config", "files", "generation", "inputs", "models", "parameters", "tokens"},
    "duration": {"config", "counts"},
    "submit": {"config", "duration", "files", "inputs", "outcomes", "pipeline", "record", "scheduler", "sources"},
    "disturb": {"checkpoints", "config", "files", "models", "optim", "trainer"},
    "faults_run": {"checkpoints", "disturb"},
    "faults": {"config", "data", "disturb", "faults_run", "files", "inputs", "locks", "models", "stage", "tokens"},
    "cli": {"cli_data", "cli_models", "cli_run"}, "cli_common": {"files", "inputs"},
    "cli_run": {"cli_common", "config", "inputs", "outcomes", "overrides", "parameters", "pipeline", "presets", "ranks", "submit"},
    "cli_models": {"cli_common", "config", "export", "inference", "talk"},
    "cli_data": {"cli_common", "config", "hub", "inputs", "overrides", "presets", "reading", "sources", "tokens"},
}
NO_TORCH = {"config", "overrides", "presets", "files", "figures", "marking", "synth", "synth_world", "synth_problems", "counts", "sources", "formats",
            "splits", "reading",
            "launch", "parameters", "preflight", "record", "resume", "stage", "inputs", "bases", "locks", "pipeline", "outcomes", "ranks", "duration", "scheduler", "submit",
            "cli",
            "cli_common", "cli_run", "cli_models", "cli_data", "report", "overlap", "report_eval", "report_figures", "report_page", "report_seeds",
            "hub", "llama_layout", "export", "templates"}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ("modern_llm." if node.level else "") + (node.module or "")
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return found


MODULES = sorted(p.stem for p in PACKAGE.glob("*.py") if not p.stem.startswith("_"))


@pytest.mark.parametrize("module", MODULES)
def test_import_rule(module):
    used = {name.split(".")[1] for name in imports(PACKAGE / f"{module}.py")
            if name.startswith("modern_llm.") and name.split(".")[1] in MODULES}
    assert used <= ALLOWED[module], f"{module} imports {used - ALLOWED[module]}"
    if module in NO_TORCH:
        top = imports(PACKAGE / f"{module}.py", top_level_only=True)
        assert not any(name.split(".")[0] in ("torch", "datasets", "transformers") for name in top)


def chapters() -> dict[str, tuple[float, str]]:
    """Module -> (order in the book, notebook) for every chapter that exports."""
    found = {}
    for path in (ROOT / "nbs").glob("*.ipynb"):
        sources = ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
        order = next((float(line[8:]) for line in sources[0].splitlines() if line.startswith("- order:")), None)
        module = next((s.split()[2] for s in sources if s.startswith("#| default_exp")), None)
        if module:
            found[module] = order, path.stem
    return found


def test_a_chapter_imports_earlier_chapters_only():
    book = chapters()
    assert {"layers", "attention", "models", "data", "trainer"} <= book.keys()
    for module, (order, notebook) in book.items():
        for name in imports(PACKAGE / f"{module}.py"):
            other = name.split(".")[1] if name.startswith("modern_llm.") else ""
            assert other not in book or book[other][0] < order, f"{notebook} comes before {book[other][1]}, which it imports"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of what nbdev reads and writes."""
    target = tmp_path_factory.mktemp("copy")
    for name in ("nbs", "modern_llm"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "setup.py"):
        shutil.copy(ROOT / name, target)
    return target


@pytest.mark.parametrize("command", ["nbdev_clean", "nbdev_export"])
def test_nbdev_changes_nothing(copy, command):
    read = lambda: {p.relative_to(copy): p.read_bytes() for p in copy.rglob("*") if p.suffix in (".py", ".ipynb")}
    before = read()
    subprocess.run([Path(sys.executable).parent / command], cwd=copy, check=True, capture_output=True,
                   env={**os.environ, "PYTHONPATH": str(copy)})
    changed = [str(k) for k in before.keys() | read().keys() if before.get(k) != read().get(k)]
    assert changed == [], f"{command} changes {changed}: run `make export` and commit the result"


def test_readme_is_the_index_notebook():
    subprocess.run([sys.executable, ROOT / "scripts" / "readme.py", "--check"], check=True)


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda p: p.stem)
def test_workflows_run_what_is_here(path):
    """Every step says what it uses or runs; targets, files and extras in its command exist, and so do the files a cache is keyed by."""
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert all(("run" in step) != ("uses" in step) for step in steps)
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
    keyed = [name for step in steps for name in step.get("with", {}).get("cache-dependency-path", "").split()]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    extras = re.findall(r"^(\w+)_requirements", (ROOT / "settings.ini").read_text(encoding="utf-8"), re.M)
    for line in (step["run"] for step in steps if "run" in step):
        match line.split("#")[0].split():
            case ["make", target]:
                assert target in targets
            case ["bash", script, chosen]:
                assert set(chosen.split(",")) <= set(extras)
                keyed.append(script)
            case [".venv/bin/python", "-m", "pytest", *tests]:
                keyed += tests
            case ["sudo", "apt-get", "update", *_]:
                pass
            case _:
                pytest.fail(f"{line!r}: no check for such a command")
    assert keyed and [name for name in keyed if not (ROOT / name).is_file()] == []
    assert all(job in jobs for needed in jobs.values() for job in [needed.get("needs")] if job)


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("*.ipynb")), ids=lambda p: p.stem)
def test_stored_notebook(path):
    """Stored notebooks are small, without tracebacks, machine paths or progress bars, and every code cell was run."""
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert len(text) < 400_000
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    stored = json.dumps([{k: v for k, v in o.items() if k != "data"} for o in outputs]
                        + [o.get("data", {}).get("text/plain", "") for o in outputs])
    for dirt in ("/home/", "/root/", "/work/", "/tmp/", "it/s]", "vnd.jupyter.widget", " at 0x"):
        assert dirt not in stored, f"{path.name} stores {dirt!r}"
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
