"""JupyterLab as `make lab` starts it, driven in a browser: chapters run without an error and show
their plots, training draws its curve live.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from modern_llm.tests.browser import chromium_page

ROOT = Path(__file__).resolve().parents[2]
CELLS = """() => [...document.querySelectorAll('.jp-CodeCell')].map(cell => ({
    prompt: cell.querySelector('.jp-InputPrompt').textContent,
    text: cell.querySelector('.jp-Cell-outputArea')?.textContent ?? '',
    images: [...cell.querySelectorAll('.jp-Cell-outputArea img')].filter(i => i.naturalWidth > 100).map(i => i.src),
    error: !!cell.querySelector('[data-mime-type="application/vnd.jupyter.error"]')}))"""


@pytest.fixture(scope="module")
def page():
    with chromium_page() as page:
        yield page


@pytest.fixture(scope="module")
def lab(page, tmp_path_factory):
    """The server `make lab` starts, on a copy of the notebooks, and the page it opens first."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "nbs", folder / "nbs",
                    ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copytree(ROOT / "report", folder / "report")
    said = subprocess.run(["make", "-n", "lab"], cwd=ROOT, capture_output=True, text=True,
                          check=True).stdout  # inside another make, more than the recipe
    made, = (line for line in said.splitlines() if "jupyter lab" in line)
    words = shlex.split(made.replace(str(ROOT), str(folder)))
    words = words[words.index("jupyter"):]
    config = {
        name: str(folder / name.lower())
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR")}
    env = {**os.environ, **config, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
           "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [*words, "--no-browser", "--ServerApp.port=0", "--allow-root",
               "--LabApp.news_url=None"]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
        try:
            opened = wait_for(
                lambda: next(folder.glob("jupyter_runtime_dir/jpserver-file-to-run-*.html"), None),
                60)
            page.goto(opened.as_uri())
            page.wait_for_url("**/lab/tree/**", timeout=60_000)
            yield server, page.url
        finally:
            # kernels outlive a killed server
            for process in [*psutil.Process(server.pid).children(recursive=True), server]:
                process.kill()
            server.wait()


def wait_for(found, seconds: float):
    end = time.time() + seconds
    while not (value := found()):
        assert time.time() < end, f"nothing after {seconds} seconds"
        time.sleep(0.3)
    return value


def run_all(page, seconds: float = 180, watch=lambda cells: None) -> list[dict]:
    """Choose Run > Run All Cells and wait until every code cell has its number."""
    # without a kernel, Run asks for one
    page.wait_for_selector('.jp-Toolbar-kernelName:has-text("ipykernel")', timeout=60_000)
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=60_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    end = time.time() + seconds
    while True:
        cells = page.evaluate(CELLS)
        watch(cells)
        failed = [cell["text"] for cell in cells if cell["error"]]
        assert failed == []
        if cells and all(re.fullmatch(r"\[\d+\]:", cell["prompt"].strip()) for cell in cells):
            return cells
        assert time.time() < end, [cell["prompt"] for cell in cells]
        time.sleep(0.5)


def open_notebook(page, address: str, name: str) -> None:
    page.goto(re.sub(r"/lab/tree/.*$", f"/lab/tree/nbs/{name}.ipynb?reset", address))
    page.wait_for_function("n => document.querySelectorAll('.jp-CodeCell').length >= n",
                           arg=len(sources(name)), timeout=60_000)


def sources(name: str) -> list[str]:
    cells = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_lab_opens_at_the_index(page, lab):
    server, address = lab
    assert address.split("?")[0].endswith("/lab/tree/nbs/index.ipynb")
    page.wait_for_selector(".jp-Notebook", timeout=60_000)
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=60_000)

    def started() -> list[list[str]]:
        # as_dict: None for a process that has ended meanwhile
        commands = [process.as_dict(["cmdline"])["cmdline"] or []
                    for process in psutil.Process(server.pid).children(recursive=True)]
        return [words for words in commands if "ipykernel_launcher" in " ".join(words)]

    kernels = wait_for(started, 60)
    assert ({Path(words[0]).parent.resolve() for words in kernels}
            == {Path(sys.executable).parent.resolve()})
    assert wait_for(lambda: "Before and after" in page.inner_text(".jp-Notebook"), 60)
    drawn = ("() => [...document.querySelectorAll('.jp-Notebook img')].some(i => "
             "i.alt.includes('by stage') && i.naturalWidth > 100)")
    assert wait_for(lambda: page.evaluate(drawn), 60), "the figure of the results"
    page.hover(".jp-Notebook")

    def formulas_in_view() -> bool:  # cells are drawn as they come into view
        page.mouse.wheel(0, 400)
        return (page.locator(".jp-Notebook mjx-container").count() >= 4
                and "RMSNorm" in page.text_content(".jp-Notebook"))

    assert wait_for(formulas_in_view, 60)


@pytest.mark.parametrize("name", ["00_layers", "02_model"])
def test_a_chapter_runs(page, lab, name):
    open_notebook(page, lab[1], name)
    page.get_by_role("menuitem", name="Edit", exact=True).click()
    page.get_by_role("menuitem", name="Clear Outputs of All Cells", exact=True).click()
    cells = run_all(page)
    stored = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    figures = sum("image/png" in o.get("data", {}) for cell in stored
                  for o in cell.get("outputs", []))
    assert (len(cells) == len(sources(name))
            and sum(len(cell["images"]) for cell in cells) == figures > 0)


def test_the_curve_is_drawn_while_training(page, lab):
    open_notebook(page, lab[1], "03_pretrain")
    train = next(i for i, source in enumerate(sources("03_pretrain")) if "live_curves(" in source)
    during = set()

    def watch(cells):
        if cells and cells[train]["prompt"].strip() == "[*]:":
            during.update(cells[train]["images"])

    cells = run_all(page, watch=watch)
    assert len(during) >= 2, "the figure did not change during training"
    assert re.search(r"\d+/120 ", cells[train]["text"]), cells[train]["text"]  # the bar
    assert "finished" in cells[train]["text"] and len(cells[train]["images"]) == 1
