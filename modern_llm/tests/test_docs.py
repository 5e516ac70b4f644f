"""The documentation site: built once, read as files, then opened in a browser.

`bash scripts/environment.sh docs,browser` installs what these tests need beside a Chromium or
Chrome; without it they skip.
"""

import json
import os
import re
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pandas as pd
import pytest

from modern_llm.tests.browser import chromium_page

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("sphinx", "furo", "myst_nb", "sphinx_copybutton", "sphinx-mathjax-offline")
if missing := [name for name in TOOLS if not find_spec(name)]:
    pytest.skip(f"no {', '.join(missing)}: the site is built where the extra `docs` is installed",
                allow_module_level=True)


class Page(HTMLParser):
    """What a page refers to, where it can be pointed at, and its text outside code."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.resources, self.ids, self.text, self.formulas, self.open = (
            [], [], set(), [], 0, [])
        self.next = self.previous = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name) and tag != "meta"}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") in ("next", "prev"):
            setattr(self, {"next": "next", "prev": "previous"}[found["rel"]], found["href"])
        elif (tag in ("script", "img", "source", "link", "iframe")
              and (address := found.get("src") or found.get("href"))):
            self.resources.append(address)
        classes = (found.get("class") or "").split()
        formula = "math" in classes
        self.formulas += formula
        if (tag in ("pre", "code", "script", "style") or formula or "pre" in classes
                or (self.open and tag == self.open[-1])):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and tag == self.open[-1]:
            self.open.pop()

    def handle_data(self, data):
        if not self.open:
            self.text.append(data)


@pytest.fixture(scope="module")
def site():
    """The site, built in `_docs/html`; Sphinx treats warnings as errors."""
    done = subprocess.run([sys.executable, ROOT / "docs" / "build.py"], capture_output=True,
                          text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("No items are published beside") <= 1
    return ROOT / "_docs" / "html"


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site).as_posix(): Page(path)
            for path in site.rglob("*.html") if "_static" not in path.parts}


def notebooks() -> dict[str, list[dict]]:
    """Chapter -> cells, in reading order."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8"))["cells"]
             for path in (ROOT / "nbs").glob("*.ipynb")}
    del found["index"]
    order = {stem: float(re.search(r"^- order: (\S+)", "".join(cells[0]["source"]), re.M)[1])
             for stem, cells in found.items()}
    return {stem: found[stem]
            for stem in sorted(found, key=lambda stem: (order[stem], stem + ".ipynb"))}


def test_the_examples_of_a_command_keep_their_lines(site):
    text = (site / "api" / "cli.run_commands.html").read_text(encoding="utf-8")
    assert "\b" not in text and re.search("<pre><span></span>modern-llm run [^\\n]*\\n", text)


def test_every_link_leads_somewhere(site, pages):
    assert len(pages) > 60
    broken, checked = [], 0
    for name, page in pages.items():
        for address in [*page.links, *page.resources]:
            url = urlsplit(address)
            if url.scheme or url.netloc:
                if address in page.resources and url.scheme != "data":
                    broken.append(f"{name} loads {address} from elsewhere")
                continue
            target = ((site / name).parent.joinpath(unquote(url.path)).resolve() if url.path
                      else site / name)
            place = os.path.relpath(target, site)
            checked += 1
            if not target.is_file():
                broken.append(f"{name}: {address} is not a file")
            elif url.fragment and place in pages and unquote(url.fragment) not in pages[place].ids:
                broken.append(f"{name}: {address} has no such anchor")
    assert broken == [] and checked > 5_000


def test_formulas_are_mathematics(pages):
    """Every formula of the chapters is marked as one, and no TeX is left in the text around them.
    """
    for name, page in pages.items():
        # variables of the environment are none
        text = re.sub(r"\$[A-Z][A-Z_]+", "", "".join(page.text))
        assert not re.search(
            r"\$|\\(frac|tfrac|sum|mathrm|text|sqrt|log|cdot|qquad|le|sigma|beta)\b", text
        ), f"{name} shows TeX"
    for stem, cells in notebooks().items():
        text = "\n".join("".join(cell["source"])
                         for cell in cells if cell["cell_type"] == "markdown")
        text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)
        expected = len(re.findall(r"\$\$.+?\$\$|\$[^$\n]+\$", text, re.S))
        assert pages[f"nbs/{stem}.html"].formulas >= expected, stem


def test_chapters_follow_each_other(pages):
    book = list(notebooks())
    for before, after in zip(book, book[1:]):
        assert pages[f"nbs/{before}.html"].next == f"{after}.html"
        assert pages[f"nbs/{after}.html"].previous == f"{before}.html"
    assert pages["index.html"].next == f"nbs/{book[0]}.html"


def test_chapters_can_be_downloaded(site, pages):
    for stem in notebooks():
        target, = {link for link in pages[f"nbs/{stem}.html"].links if link.endswith(".ipynb")}
        assert ((site / "nbs" / target).resolve().read_bytes()
                == (ROOT / "nbs" / f"{stem}.ipynb").read_bytes())


def test_reference_leads_to_the_cell_that_defines(site, pages):
    """Every exported name is in the reference and linked to a place in its chapter; there, the next
    code is its definition.
    """
    names = 0
    for path in (ROOT / "modern_llm").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if not (chapter := re.search(r"File to edit: (?:\.\./)+nbs/(\S+)\.ipynb", text)):
            continue
        module = ".".join(path.relative_to(ROOT / "modern_llm").with_suffix("").parts)
        page, html = (pages[f"api/{module}.html"],
                      (site / "nbs" / f"{chapter[1]}.html").read_text(encoding="utf-8"))
        for name in re.findall(r"'(\w+)'", re.search(r"^__all__ = \[.*?\]", text, re.S | re.M)[0]):
            assert f"modern_llm.{module}.{name}" in page.ids, name
            back = f"../api/{module}.html#modern_llm.{module}.{name}"
            assert back in pages[f"nbs/{chapter[1]}.html"].links, name
            code = re.sub(r"<[^>]+>", "",
                          html[html.index(f'href="{back}"'):].split('<div class="highlight', 1)[1]
                              .split("</pre>", 1)[0])
            assert re.search(rf"(^|\W)((def|class) {name}\b|{name}\b.* = |{name}: )",
                             code), f"{name} is not where {module} says"
            names += 1
    assert names > 200


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address(site):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with chromium_page() as page:
        yield page


def test_every_page_in_a_browser(address, pages, browser):
    """On a phone: no error on the console, nothing missing, nothing from elsewhere, nothing wider
    than the screen; every formula drawn.
    """
    complaints = []
    listeners = {"console": lambda m: m.type in ("error", "warning")
                                      and complaints.append(f"{browser.url}: {m.text}"),
                 "pageerror": lambda e: complaints.append(f"{browser.url}: {e}"),
                 "requestfailed": lambda r: r.failure == "net::ERR_ABORTED"
                 or complaints.append(f"{browser.url}: {r.url} failed, {r.failure}"),
                 "request": lambda r: r.url.startswith((address, "data:"))
                                      or complaints.append(f"{browser.url}: asks {r.url}")}
    for event, listener in listeners.items():
        browser.on(event, listener)
    browser.set_viewport_size({"width": 390, "height": 844})
    for name in pages:
        browser.goto(f"{address}/{name}")
        if pages[name].formulas:
            browser.evaluate("MathJax.startup.promise.then(() => null)")
        wide, raw, drawn, wrong = browser.evaluate("""() => [
            document.documentElement.scrollWidth - window.innerWidth,
            [...document.querySelectorAll('.math')].filter(e => /[$\\\\]/.test(e.innerText)).length,
            [...document.querySelectorAll('.math mjx-math')].filter(e => e.getBoundingClientRect().width > 3).length,
            document.querySelectorAll('mjx-merror').length]""")
        if wide > 0 or raw or wrong or drawn != pages[name].formulas:
            complaints.append(f"{name}: {wide} pixels too wide; of {pages[name].formulas} formulas "
                              f"{drawn} drawn, {raw} raw, {wrong} wrong")
    for event, listener in listeners.items():
        browser.remove_listener(event, listener)
    assert complaints == []


def seen(browser) -> list[str]:
    """The items that are seen on a page of items: their numbers and groups."""
    return browser.eval_on_selector_all(
        "table.items tbody tr:not([hidden]) th", "heads => heads.map(head => head.textContent)")


def test_a_click_on_a_number_shows_its_items(site, browser):
    """From the files alone: what was clicked on is chosen, and its wrong answers are as many as the
    number says.
    """
    browser.set_viewport_size({"width": 1280, "height": 844})
    browser.goto((site / "report" / "local-cpu_report.html").as_uri())
    ledger = pd.read_csv(ROOT / "report/results/local-cpu/ledger.csv").set_index(
        ["stage", "task", "metric"])
    row = ledger.loc["sft", "problems", "exact match"]
    browser.click("a.items[href$='problems.html#exact-match-sft'] >> nth=0")
    browser.wait_for_selector(".items-bar output")
    said = lambda: browser.inner_text(".items-bar output")
    assert said() == f"250 of 250 items, mean {row.value:.3f}" and len(seen(browser)) == 250
    number, shown, order = (f".items-bar label:nth-of-type({place}) select" for place in (1, 2, 3))
    assert browser.input_value(number) == "exact-match-sft"
    assert "Then" in browser.inner_text("table.items tbody tr td >> nth=0")

    browser.select_option(shown, "wrong")
    wrong = seen(browser)
    assert len(wrong) == round(row.n * (1 - row.value)) and said().endswith("mean 0.000")
    assert browser.locator("table.items tr:not([hidden]) td[data-stage=sft].wrong").count() == len(
        wrong)
    browser.select_option(shown, "right")
    assert len(seen(browser)) == 250 - len(wrong)
    browser.select_option(shown, "all")
    browser.select_option(order, "worst")
    assert seen(browser)[:len(wrong)] == wrong
    browser.click("#exact-match-level-5-dpo")
    level = ledger.loc["dpo", "problems", "exact match, level 5"]
    assert said() == f"{level.n} of 250 items, mean {level.value:.3f}"
    assert all("level 5" in head for head in seen(browser))


def test_the_items_can_be_read_without_javascript(site, browser):
    context = browser.context.browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((site / "report" / "local-cpu_report.html").as_uri())
    page.click("a.items[href$='sentiment-asked.html#accuracy-sft'] >> nth=0")
    page.wait_for_load_state()
    assert page.locator("table.items tbody tr").count() == 872
    assert page.locator("select").count() == 0 and page.locator("#accuracy-sft").is_visible()
    context.close()


def test_search(address, browser):
    browser.goto(f"{address}/search.html?q=RoPE")
    browser.wait_for_selector("#search-results ul.search li a")
    found = browser.eval_on_selector_all("#search-results ul.search li a",
                                         "links => links.map(a => a.getAttribute('href'))")
    assert any("01_attention.html" in link for link in found)


@pytest.mark.parametrize("width", [390, 1280], ids=["phone", "desktop"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_screenshots(address, browser, scheme, width):
    """Pictures for the eye in `_docs/screenshots`; text stands out from its background in both
    schemes.
    """
    from matplotlib.image import imread

    folder = ROOT / "_docs" / "screenshots"
    folder.mkdir(exist_ok=True)
    browser.emulate_media(color_scheme=scheme)
    browser.set_viewport_size({"width": width, "height": 844})
    for name in ("index", "nbs/01_attention", "nbs/05_dpo", "api/models.attention",
                 "report/local-smoke_report"):
        browser.goto(f"{address}/{name}.html")
        picture = folder / f"{name.replace('/', '-')}-{scheme}-{width}.png"
        browser.screenshot(path=picture)
        brightness = imread(picture)[..., :3].mean(axis=-1)
        assert ((brightness.mean() > 0.5) == (scheme == "light")
                and brightness.max() - brightness.min() > 0.6), picture.name
