"""The project's own rules: notebooks and package in step, imports in order, documents true."""

import ast
import configparser
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml

from modern_llm.config.stages import STAGES
from modern_llm.runs.practice import SPINE

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "modern_llm"

# The folders of the package in one direction: each imports only what stands before it, and its own
# modules without a circle.
GROUND = ("files", "statistics", "figures", "messages")
DIRECTION = (GROUND, ("config",), ("models",), ("data",), ("interchange", "training"),
             ("evaluation",), ("report",), ("runs",), ("cluster", "serving"), ("cli",))
LEVEL = {folder: level for level, folders in enumerate(DIRECTION) for folder in folders}
# until it is needed
WITHOUT_TORCH = {"files", "statistics", "figures", "messages", "config", "report", "runs",
                 "cluster", "cli"}
ALSO_WITHOUT_TORCH = ({f"data.{name}"
                       for name in ("sources", "formats", "splits", "reading", "marking",
                                    "templates", "conversations", "synth", "synth_world",
                                    "synth_problems")}
                      | {"models", "models.counts", "evaluation.overlap", "interchange.hub",
                         "interchange.importing", "interchange.llama_layout", "interchange.export"})


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            around = path.relative_to(ROOT).parts[:-node.level] if node.level else ()
            module = ".".join([*around, *filter(None, [node.module])])
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return found


def module_name(path: Path) -> str:
    """`models.layers` for modern_llm/models/layers.py, `models` for its folder's face."""
    return ".".join(
        part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__")


MODULES = {
    module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))
    if "tests" not in path.parts and path.name != "_modidx.py" and path != PACKAGE / "__init__.py"}


def used_by(module: str) -> set[str]:
    """The modules of the package that a module imports, anywhere in its code."""
    names = {name.removeprefix("modern_llm.")
             for name in imports(MODULES[module]) if name.startswith("modern_llm.")}
    return {name for name in names if name in MODULES} - {module}


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_in_one_direction(module):
    folder = module.split(".")[0]
    for used in used_by(module):
        other = used.split(".")[0]
        assert other == folder or other in GROUND or LEVEL[other] < LEVEL[folder], (
            f"{module} imports {used}, which stands behind it or beside it")
    if folder in WITHOUT_TORCH or module in ALSO_WITHOUT_TORCH:
        top = imports(MODULES[module], top_level_only=True)
        assert not any(name.split(".")[0] in ("torch", "datasets", "transformers") for name in top)


def test_no_folder_imports_in_a_circle():
    # a folder's face is no part of a circle
    graph = {module: used_by(module) - {module.split(".")[0]} for module in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("stage", [spec for spec in STAGES.values() if spec.notebook], ids=str)
def test_a_stage_needs_no_tool_of_developers(stage):
    """What its notebook imports while it runs, settings.ini requires for everybody."""
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    required = {re.split(r"[<>=;]", name)[0] for name in settings["DEFAULT"]["requirements"].split()}
    allowed = sys.stdlib_module_names | required | {"modern_llm", "IPython"}
    cells = json.loads((ROOT / "nbs" / stage.notebook).read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    found = set(re.findall(r"^(?:from|import) (\w+)|^%(?:load_ext) (\w+)", code, re.M))
    assert {name for pair in found for name in pair if name} <= allowed


def test_every_chapter_has_its_place():
    """The spine is twelve chapters in their order; every other chapter stands on the shelf that its
    number names, and says so; 17a behind 17.
    """
    orders = {path.stem: float(re.search(r"^- order: (\S+)", "".join(
        json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]
    ), re.M)[1]) for path in (ROOT / "nbs").glob("*.ipynb") if path.stem != "index"}
    book = sorted(orders, key=orders.get)
    assert tuple(book[:12]) == SPINE and len(set(orders.values())) == len(orders)
    assert all(re.match(r"[1-7]\d[a-z]?_", stem) and int(orders[stem]) == int(stem[:2])
               and (orders[stem] > int(stem[:2])) == stem[2].isalpha() for stem in book[12:])


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of what nbdev reads and writes."""
    target = tmp_path_factory.mktemp("copy")
    for name in ("nbs", "modern_llm"):
        shutil.copytree(ROOT / name, target / name,
                        ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "setup.py"):
        shutil.copy(ROOT / name, target)
    return target


@pytest.mark.parametrize("command", ["nbdev_clean", "nbdev_export"])
def test_nbdev_changes_nothing(copy, command):
    read = lambda: {p.relative_to(copy): p.read_bytes()
                    for p in copy.rglob("*") if p.suffix in (".py", ".ipynb")}
    before = read()
    subprocess.run([Path(sys.executable).parent / command], cwd=copy, check=True,
                   capture_output=True, env={**os.environ, "PYTHONPATH": str(copy)})
    after = read()
    changed = [str(k) for k in before.keys() | after.keys() if before.get(k) != after.get(k)]
    assert changed == [], f"{command} changes {changed}: run `make export` and commit the result"


def test_readme_is_the_index_notebook():
    subprocess.run([sys.executable, ROOT / "scripts" / "readme.py", "--check"], check=True)


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")),
                         ids=lambda p: p.stem)
def test_workflows_run_what_is_here(path):
    """Every step says what it uses or runs; targets, files and extras in its command exist, and so
    do the files a cache is keyed by.
    """
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert all(("run" in step) != ("uses" in step) for step in steps)
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])
               for step in steps if "uses" in step)
    keyed = [name for step in steps
             for name in step.get("with", {}).get("cache-dependency-path", "").split()]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    extras = re.findall(r"^(\w+)_requirements",
                        (ROOT / "settings.ini").read_text(encoding="utf-8"), re.M)
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
    """Stored notebooks are small, without tracebacks, machine paths or progress bars, and every
    code cell was run.
    """
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


def too_long(text: str) -> list[str]:
    """The lines of some code with more than 100 columns that are not inside of a longer string."""
    inside: set[int] = set()
    lines = [line if not line.startswith(("%", "!")) else "" for line in text.split("\n")]
    for token in tokenize.generate_tokens(io.StringIO("\n".join(lines)).readline):
        if token.start[0] != token.end[0]:
            inside |= set(range(token.start[0], token.end[0] + 1))
    return [line for number, line in enumerate(lines, 1)
            if len(line) > 100 and number not in inside and "# noqa" not in line]


def test_lines_are_short():
    """Code has at most 100 columns, but for one address; what nbdev writes is its own matter."""
    found = {}
    paths = [PACKAGE.rglob("*.py"), (ROOT / "scripts").glob("*.py"), (ROOT / "docs").glob("*.py")]
    for path in itertools.chain(*paths):
        text = path.read_text(encoding="utf-8")
        if "AUTOGENERATED! DO NOT EDIT" not in text and path.name != "_modidx.py":
            found[path.name] = too_long(text)
    for path in (ROOT / "nbs").glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                found[f"{path.name}#{cell['id']}"] = too_long("".join(cell["source"]))
    found = {place: lines for place, lines in found.items() if lines}
    assert found.keys() <= {"readme.py"}, found
