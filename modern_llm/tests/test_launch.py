"""What lies about on a user's machine does not come between a stage and its kernel; a kernel that
dies is named with its last words.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import modern_llm
from modern_llm.config import ConfigError
from modern_llm.data.sources import DataError, DatasetNotFound
from modern_llm.data.templates import TemplateError
from modern_llm.files import DamagedFolder, read_json
from modern_llm.interchange.llama_layout import CannotImport
from modern_llm.messages import Preempted, StageError
from modern_llm.report.page import ReportError
from modern_llm.runs import execution, pipeline
from modern_llm.runs.launch import KERNEL_DIED, SAME_PACKAGE, stage_environment, start_papermill
from modern_llm.runs.spec import notebook_of
from modern_llm.tests import papermill
from modern_llm.training.recording import TrainingDiverged
from modern_llm.training.training_state import CheckpointError

pytestmark = pytest.mark.fault("kernel")
SHADOWS = ("random", "datasets", "torch", "json", "token", "numpy", "papermill", "ipykernel",
           "logging", "modern_llm")
LOOK = f"""
import datasets, json, locale, os, random, sys
import matplotlib.pyplot as plt
import modern_llm
plt.figure()
try:
    assert False
except AssertionError:
    asserts = True
else:
    asserts = False
print("FACTS " + json.dumps({{
    "executable": sys.executable, "path": sys.path, "random": random.__file__, "datasets": datasets.__file__, "package": modern_llm.__file__,
    "backend": plt.get_backend(), "asserts": asserts, "startup": [n for n in ("from_startup", "from_profile", "from_rc") if n in globals()],
    "encoding": [sys.stdout.encoding.lower(), locale.getpreferredencoding(False).lower()], "name": name, "count": count, "text": text,
    "shadowed": [n for n in {SHADOWS!r} if getattr(sys.modules.get(n), "SHADOW", False)], "folder": os.getcwd(),
    "figure size": plt.rcParams["figure.figsize"]}}))
print("é ▸ 日本")
"""


def page(folder, *cells):
    """A small notebook, with a cell of parameters."""
    parameters = nbformat.v4.new_code_cell(
        "name, count, text = '', 0, ''", metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(
        cells=[parameters, *map(nbformat.v4.new_code_cell, cells)], metadata={
            "kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    nbformat.write(notebook, folder / "page.ipynb")
    return folder / "page.ipynb"


def surroundings(place: Path) -> dict[str, str]:
    """Every bad neighbour at once: files in `place`, the working folder, and an environment."""
    for name in SHADOWS:
        path = (place / name / "__init__.py" if name in ("datasets", "modern_llm")
                else place / f"{name}.py")
        path.parent.mkdir(exist_ok=True)
        path.write_text("SHADOW = True\nraise SystemExit('shadowed')\n")
    foreign = place / "share" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    (foreign / "kernel.json").write_text(json.dumps(
        {"argv": ["/no/such/python", "-f", "{connection_file}"], "display_name": "other",
         "language": "python"}))
    startup = place / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text("from_profile = True\n")
    (startup.parent / "ipython_kernel_config.py").write_text(
        "raise RuntimeError('a broken profile')\n")
    (place / "startup.py").write_text("from_startup = True\n")
    (place / "rc").write_text("figure.figsize: 50, 50\n")
    return {"JUPYTER_PATH": str(place / "share"), "IPYTHONDIR": str(place / "ipython"),
            "PYTHONSTARTUP": str(place / "startup.py"), "MATPLOTLIBRC": str(place / "rc"),
            "MPLBACKEND": "Qt5Agg", "PYTHONOPTIMIZE": "1", "PYTHONINSPECT": "1",
            "PYTHONWARNINGS": "error", "PYTHONIOENCODING": "ascii", "LC_ALL": "C",
            "HOME": "/dev/null", "JUPYTER_RUNTIME_DIR": "/dev/null/runtime", "TMPDIR": "/no/where",
            "http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What a notebook saw that was executed in the middle of all that."""
    place = tmp_path_factory.mktemp("surroundings")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in surroundings(place).items():
            patch.setenv(name, value)
        patch.chdir(place)
        process = start_papermill(page(place, LOOK), place / "out.ipynb",
                                  {"name": "123", "count": 3, "text": "a 'b' \"c\" é None"})
        text = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, text
    assert "é ▸ 日本" in text
    return {**json.loads(next(line for line in text.splitlines() if line.startswith("FACTS "))[6:]),
            "place": str(place)}


SAME = str(Path(modern_llm.__file__).resolve())


@pytest.mark.parametrize("case, holds", [
    ("a foreign kernel named python3", lambda seen: seen["executable"] == sys.executable),
    ("the working folder", lambda seen: "" not in seen["path"] and seen["place"] not in seen["path"]
                                        and seen["folder"] == seen["place"]),
    ("random.py", lambda seen: not seen["random"].startswith(seen["place"])),
    ("a folder named datasets", lambda seen: not seen["datasets"].startswith(seen["place"])),
    ("a folder named modern_llm", lambda seen: str(Path(seen["package"]).resolve()) == SAME),
    ("modules of any name", lambda seen: seen["shadowed"] == []),
    ("a backend with windows", lambda seen: "inline" in seen["backend"]),
    ("PYTHONOPTIMIZE", lambda seen: seen["asserts"]),
    ("startup files and a broken profile", lambda seen: seen["startup"] == []),
    ("an encoding that knows no é", lambda seen: seen["encoding"] == ["utf-8", "utf-8"]),
    ("figures of another size", lambda seen: seen["figure size"] != [50, 50]),
    ("texts that look like numbers",
     lambda seen: (seen["name"], seen["count"], seen["text"]) == ("123", 3, "a 'b' \"c\" é None")),
], ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "")
def test_a_stage_is_not_disturbed_by(seen, case, holds):
    assert holds(seen), seen


def test_a_kernel_that_dies_keeps_its_page_and_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/dev/null")
    dying = page(tmp_path, "print('so far')",
                 "import os, sys; print('my last words', file=sys.__stderr__, flush=True); "
                 "os._exit(9)", "never")
    process = start_papermill(dying, tmp_path / "out.ipynb", {})
    text = process.communicate(timeout=300)[0].decode()
    assert process.returncode == KERNEL_DIED and "my last words" in text and "Traceback" not in text
    assert f"the kernel ({sys.executable}) ended by itself after" in text
    assert "so far" in (tmp_path / "out.ipynb").read_text()


def test_a_kernel_that_never_began_names_no_notebook_and_says_its_last_words(tmp_path):
    (tmp_path / "path" / "ipykernel").mkdir(parents=True)
    (tmp_path / "path" / "ipykernel" / "__init__.py").write_text(
        "raise ImportError('no kernel today')\n")
    done = subprocess.run([Path(sys.executable).parent / "modern-llm", "run", "--preset", "lesson",
                           "--stage", "pretrain", "--run", "it", "--output-dir", tmp_path / "runs"],
                          env={**os.environ, "PYTHONPATH": str(tmp_path / "path")}, cwd=tmp_path,
                          capture_output=True, text=True)
    text = done.stdout + done.stderr
    assert (done.returncode == KERNEL_DIED and "no kernel today" in text
            and "ended by itself before the first cell" in text)
    assert ("it got no notebook" in text and "notebook.ipynb" not in text
            and not list((tmp_path / "runs").rglob("*.ipynb")))


def test_other_interpreters_run_this_very_package_too(tmp_path):
    """As the ranks do that torchrun starts."""
    surroundings(tmp_path)
    code = (SAME_PACKAGE + "import json, random, modern_llm.config; "
                           "print(json.dumps([modern_llm.__file__, random.__file__]))")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, check=True)
    package, random = json.loads(done.stdout)
    assert str(Path(package).resolve()) == SAME and not random.startswith(str(tmp_path))


def test_the_report_draws_into_files(monkeypatch):
    from modern_llm.report import write

    monkeypatch.setenv("MPLBACKEND", "Qt5Agg")
    seen = []
    monkeypatch.setattr(write, "write_report",
                        lambda *_, **__: seen.append(os.environ["MPLBACKEND"]) or Path("page"))
    monkeypatch.setattr(execution, "read_json", lambda path: {})
    monkeypatch.setattr(execution, "write_json", lambda path, value: None)
    execution.write_the_report(pipeline.Step("report", Path("/no/run"), {}, "run"))
    assert seen == ["Agg"] and stage_environment()["MPLBACKEND"].endswith("backend_inline")


def test_a_terminal_that_knows_no_accents_shows_the_rest():
    code = ("from modern_llm.cli import main; main(['presets'], standalone_mode=False)\n"
            "from modern_llm.runs.execution import show; show(['é ▸\\n'.encode(), b'after'])")
    done = subprocess.run([sys.executable, "-c", code],
                          env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True,
                          text=True)
    assert done.stdout.endswith("\n\\xe9 \\u25b8\nafter\n") and done.returncode == 0, done


@pytest.mark.parametrize("more, frozen", [("", False), ("; main(['presets'])", True)])
def test_only_a_command_leaves_out_the_last_collection(more, frozen):
    code = ("import atexit, gc; atexit.register(lambda: print('frozen', gc.get_freeze_count() > 0))"
            f"; from modern_llm.cli import main{more}")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith(f"frozen {frozen}\n"), done


RULE = 75 * "-"
FAILED = [RULE, 'Exception encountered at "In [4]":']
TRACED = [RULE, "TypeError    Traceback (most recent call last)", "Cell In[4], line 2",
          "----> 2 begin()", "", "TypeError: it cannot run here:"]
UNREADABLE = ["  Cell In[4], line 2", "    begin(", "         ^",
              "SyntaxError: '(' was never closed"]


@pytest.mark.fault("messages")
@pytest.mark.parametrize("lines, shown", [
    (["StageError: it cannot run here:"], ["it cannot run here:"]),
    (["DataError: it cannot run here:"], ["it cannot run here:"]),
    (TRACED, [*FAILED, *TRACED]), (UNREADABLE, [*FAILED, *UNREADABLE])])
def test_what_its_user_can_mend_is_said_without_a_traceback(lines, shown, capsys):
    device = "  - device='cuda:7' is not there"
    execution.show(f"{line}\n".encode() for line in [RULE, "a table", *FAILED, *lines, device])
    assert capsys.readouterr().out.splitlines() == [RULE, "a table", *shown, device]


def errors_of(page: Path) -> list[dict]:
    return [output for cell in read_json(page)["cells"] for output in cell.get("outputs", [])
            if output["output_type"] == "error"]


@pytest.mark.parametrize("error", [
    StageError, Preempted, ConfigError, DataError, DatasetNotFound, CheckpointError, DamagedFolder,
    CannotImport, TemplateError, TrainingDiverged, ReportError])
def test_what_its_user_can_mend_is_a_line_in_a_notebook(error):
    assert error("say so")._render_traceback_() == [f"{error.__name__}: say so"]


@pytest.mark.fault("messages")
def test_papermill_shows_a_refusal_in_one_line(tmp_path):
    page, runs = tmp_path / "page.ipynb", tmp_path / "runs"
    done = subprocess.run(
        [*papermill.COMMAND, notebook_of("pretrain"), page, "-p", "max_step", "3", "-p",
         "output_dir", runs], capture_output=True, text=True)
    [error] = errors_of(page)
    assert done.returncode == 1 and not runs.exists()
    assert len(error["traceback"]) == 1 and "did you mean 'max_steps'" in error["traceback"][0]
    assert done.stderr.endswith(f"\n{error['traceback'][0]}\n")
    assert "Traceback" not in done.stderr


def test_papermill_shows_other_errors_as_ever(tmp_path):
    done = subprocess.run([*papermill.COMMAND, page(tmp_path, "1 / 0"), tmp_path / "out.ipynb"],
                          capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert "ZeroDivisionError: division by zero" in done.stderr


@pytest.mark.fault("messages")
@pytest.mark.parametrize("stage", ["sft", "all"])
def test_a_stage_that_cannot_start_refuses_in_one_line(stage, tmp_path):
    given = ["--stage", stage, "--preset", "local-cpu", "-p", 'data.sources=["nosuch"]',
             "--output-dir", tmp_path / "runs"]
    code = "from modern_llm.cli import main; main(prog_name='modern-llm')"
    done = subprocess.run([sys.executable, "-c", code, "run", *given], capture_output=True,
                          text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not done.stdout
    assert done.stderr.startswith("Error: ") and not (tmp_path / "runs").exists()
