"""`modern-llm practice`: a chapter with blank bodies, what was written into it, and its check.

The right bodies, put back, pass; a wrong one, alone, is noticed by its chapter. By default the
first chapter and a few bodies of two others stand for all of the spine: MODERN_LLM_SLOW_TESTS=1
tries every body, which takes about an hour.
"""

import ast
import dataclasses
import json
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from modern_llm import cli
from modern_llm.runs import practice, practice_check

SLOW = bool(os.environ.get("MODERN_LLM_SLOW_TESTS"))
SAMPLE = {("01_attention", "rotary_frequencies"), ("01_attention", "apply_rotary"),
          ("02b_optim", "cross_entropy_chunk"), ("02b_optim", "_ChunkedCrossEntropy.backward")}
# the chapters whose results, too, are each asserted; in later ones some are only shown
EVERY_RESULT = ("01_attention", "02a_data", "02b_optim", "03_pretrain")
# what validation says of a run in progress differs from the page's final measure, by design
UNASSERTED = {"Pretraining.evaluate"}


@pytest.fixture(autouse=True)
def somewhere(monkeypatch, tmp_path):
    """An empty working folder; the threads, the dtype and pandas' options as they were."""
    monkeypatch.chdir(tmp_path)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    pd.reset_option("display")


CHANGED: list[object] = []  # what `off` has changed since the list was emptied


def off(value):
    """A result that is not right: a number or a text changed, the first of several left out."""
    if isinstance(value, (bool, np.bool_)):
        found = not value
    elif isinstance(value, torch.Tensor):
        found = (~value if value.dtype == torch.bool
                 else value * 1.5 + 0.1 if value.is_floating_point() else value + 1)
    elif isinstance(value, (int, float, np.integer, np.ndarray)):
        found = value + 1 if np.asarray(value).dtype.kind in "iu" else value * 1.5 + 0.1
    elif isinstance(value, str):
        found = f"{value}x"
    elif isinstance(value, (list, pd.DataFrame)):
        found = value[1:]
    elif isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(map(off, value))
    elif isinstance(value, dict):
        return {key: off(part) for key, part in value.items()}
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{field.name: off(getattr(value, field.name))
                                             for field in dataclasses.fields(value) if field.init})
    else:
        return value
    CHANGED.append(value)
    return found


class Off(ast.NodeTransformer):
    """Give back `off` of what is returned or yielded."""

    def wrapped(self, node):
        if node.value is not None:
            call = ast.parse("off(x)", mode="eval").body
            call.args = [node.value]
            node.value = call
        return node

    visit_Return = visit_Yield = wrapped

    def visit_Lambda(self, node):
        return node

    visit_FunctionDef = visit_Lambda


def wrong(source: str, name: str, kind: str) -> str:
    """A cell with one wrong body: it does nothing ("nothing"), or its result is `off` ("off")."""
    tree = ast.parse(source)
    node = dict(practice.definitions(tree))[name]
    kept = node.body[:len(node.body) - len(practice.body_of(node))]
    if kind == "nothing":
        generator = any(isinstance(part, (ast.Yield, ast.YieldFrom)) for part in ast.walk(node))
        node.body = [*kept, *ast.parse("return\nyield" if generator else "return").body]
    else:
        node.body = [*kept, *(Off().visit(part) for part in practice.body_of(node))]
    return ("#| export\nfrom modern_llm.tests.test_practice import off\n\n"
            + ast.unparse(ast.fix_missing_locations(tree)))


def solved(chapter: str, folder: Path, **instead: str) -> Path:
    """A copy whose blanks are filled from the chapter, with other code in some cells."""
    path, _ = practice.write_copy(chapter, folder, force=True)
    right = {**practice.code_cells(practice.read_json(practice.chapter_path(chapter))), **instead}
    notebook = practice.read_json(path)
    for cell in notebook["cells"]:
        if cell["id"] in right:
            cell["source"] = right[cell["id"]]
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return path


def bodies(chapter: str) -> list[tuple[str, str]]:
    """(cell, name) of every definition that is to be written."""
    return [(cell, name) for cell, hints in practice.blank_cells(chapter).items()
            for name in hints]


def noticed(chapter: str, folder: Path, cell: str, name: str, kind: str):
    """The first cell that does not pass with one wrong body, or None."""
    if kind == "off" and name.endswith("__init__"):
        return "returns nothing"
    source = practice.code_cells(practice.read_json(practice.chapter_path(chapter)))[cell]
    path = solved(chapter, folder, **{cell: wrong(source, name, kind)})
    CHANGED.clear()
    cells = practice_check.check(chapter, path)
    found = next((one for one in cells if one.state != "passes"), None)
    cells.close()
    return found or (None if kind == "nothing" or CHANGED else "nothing that could be off")


# ---- the copy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chapter", practice.SPINE)
def test_only_the_bodies_are_blank(chapter):
    """What is left of an exported definition is its signature, its decorators and its docstring;
    every other cell is the chapter's.
    """
    before = practice.code_cells(practice.read_json(practice.chapter_path(chapter)))
    notebook = practice.practice_copy(chapter, Path("practice"))
    after = practice.code_cells(notebook)
    assert after.pop("practice-guard") and list(after) == list(before)
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    changed = {cell for cell in before if before[cell] != after[cell]}
    assert changed == set(practice.blank_cells(chapter)) and changed
    for cell in changed:
        trees = [ast.parse(cells[cell]) for cells in (before, after)]
        assert all(practice.is_blank(node) for _, node in practice.definitions(trees[1]))
        for tree in trees:
            for _, node in practice.definitions(tree):
                del node.body[len(node.body) - len(practice.body_of(node)):]
        assert ast.unparse(trees[0]) == ast.unparse(trees[1])
        assert max(map(len, after[cell].split("\n"))) <= 100


BODIES = """#| export
def one(x): return x + 1  # the answer


class Two:
    \"\"\"What it is.\"\"\"

    size: int = 2  # stays

    def __init__(self, size):
        # how it is done
        super().__init__()
        self.size, self.rest = size, []

    @property
    def empty(self):
        \"\"\"Whether nothing is in it.\"\"\"
        # nor this
        return not self.rest

    def later(self): ...


if True:
    def three():
        @staticmethod
        def inner():
            pass
        return inner
"""
BLANKS = """#| export
def one(x):
    raise NotImplementedError("one is yours to write")


class Two:
    \"\"\"What it is.\"\"\"

    size: int = 2  # stays

    def __init__(self, size):
        raise NotImplementedError(
            "Two.__init__ is yours to write: call super().__init__(), then set self.size, "
            "self.rest")

    @property
    def empty(self):
        \"\"\"Whether nothing is in it.\"\"\"
        raise NotImplementedError("Two.empty is yours to write")

    def later(self): ...


if True:
    def three():
        raise NotImplementedError("three is yours to write")
"""


def test_a_body_goes_with_its_comments():
    text, hints = practice.blanked(BODIES)
    assert text == BLANKS and list(hints) == ["one", "Two.__init__", "Two.empty", "three"]


def test_links_lead_to_the_chapters():
    page = json.dumps(practice.practice_copy("00_layers", Path("a/b")))
    chapters = os.path.relpath(practice.notebooks_folder(), Path("a/b").resolve())
    assert f"[mixture of experts]({chapters}/16_experts.ipynb)" in page
    assert f"[the chapter]({chapters}/00_layers.ipynb)" in page and "--check --to a/b" in page


def test_a_folder_with_a_blank_in_its_name(tmp_path, monkeypatch):
    notebooks = tmp_path / "my models" / "nbs"
    notebooks.mkdir(parents=True)
    (notebooks / "00_layers.ipynb").write_bytes(
        (practice.notebooks_folder() / "00_layers.ipynb").read_bytes())
    monkeypatch.setattr(practice, "notebooks_folder", lambda: notebooks)
    page = json.dumps(practice.practice_copy("00_layers", Path("my own")))
    assert "[the chapter](../my%20models/nbs/00_layers.ipynb)" in page
    assert "(../my%20models/nbs/16_experts.ipynb)" in page and "--check --to 'my own'" in page
    said = CliRunner().invoke(cli.main, ["practice", "00_layers", "--check", "--to", "my own"])
    assert "`modern-llm practice 00_layers --to 'my own'` writes it" in said.output


def asked(*words):
    done = CliRunner().invoke(cli.main, ["practice", *words])
    return done.exit_code, done.output


def test_nothing_is_overwritten_unasked():
    assert asked("00_layers")[0] == 0
    path = Path("practice/00_layers.ipynb")
    fresh = path.read_text()
    code, said = asked("00_layers.ipynb")
    assert code == 0 and "there already, unchanged" in said
    mine = fresh.replace("SwiGLU.forward is yours", "SwiGLU.forward was mine")
    for text in (mine, "no notebook"):
        path.write_text(text)
        code, said = asked("00_layers")
        assert code == 2 and "--force" in said and "--to" in said and path.read_text() == text
    assert asked("00_layers", "--to", "again")[0] == 0 and path.read_text() == "no notebook"
    assert asked("00_layers", "--force")[0] == 0 and path.read_text() == fresh
    chapters = practice.notebooks_folder()
    before = (chapters / "00_layers.ipynb").read_bytes()
    code, said = asked("00_layers", "--to", str(chapters), "--force")
    assert code == 2 and "is the chapter itself" in said
    assert (chapters / "00_layers.ipynb").read_bytes() == before


@pytest.mark.parametrize("words, said", [
    (["01_atention"], "did you mean '01_attention'?"), (["layers"], "did you mean '00_layers'?"),
    (["zzz"], "valid: 00_layers, 01_attention"), (["00_layers", "--check"], "writes it"),
    (["00_layers", "--check", "--to", "my"], "practice 00_layers --to my` writes it"),
    (["00_layers", "--check", "--force"], "say one of them"),
    (["00_layers", "--to", "file"], "file")])
def test_what_cannot_be_done_says_what_can(words, said):
    Path("file").write_text("")
    code, output = asked(*words)
    assert code == 2 and said in output and "Traceback" not in output


# ---- imports -------------------------------------------------------------------------------------


def page(chapter: str) -> dict:
    """The namespace of a page to practise on."""
    namespace = {"__name__": "__main__"}
    practice.practise(chapter, namespace)
    return namespace


@pytest.mark.parametrize("code", [
    "from modern_llm.models.attention import attend", "from modern_llm.models.attention import *",
    "import modern_llm.models.attention as module; module.attend",
    "import modern_llm.models.attention; modern_llm.models.attention.attend",
    "from modern_llm.models import attention; attention.attend",
    "from modern_llm.models.decoder import CausalSelfAttention",
    "def late():\n    from modern_llm.models.attention import attend\n    return attend\nlate()",
])
def test_the_solution_is_not_imported(code):
    namespace = page("01_attention")
    with pytest.raises(ImportError, match="is what this page practises: define it above"):
        exec(code, namespace)


def test_an_import_gives_what_the_page_defines():
    namespace = page("02_model")
    exec("class ModernDecoderLM: pass\nmine = ModernDecoderLM", namespace)
    exec("from modern_llm.models import ModernDecoderLM as face, load_model\n"
         "from modern_llm.models.decoder import ModernDecoderLM, KVCache\n"
         "import modern_llm.models.saving as saving", namespace)
    mine = namespace["mine"]
    assert namespace["face"] is mine is namespace["ModernDecoderLM"]
    assert namespace["saving"].ModernDecoderLM is mine
    # what another chapter defines is the package's, and so is what the package itself uses
    from modern_llm.models import attention, decoder, saving

    assert namespace["KVCache"] is attention.KVCache
    assert namespace["load_model"] is saving.load_model
    assert saving.ModernDecoderLM is decoder.ModernDecoderLM is not mine


# ---- the check -----------------------------------------------------------------------------------


def states(chapter: str, path: Path) -> dict[str, practice_check.Cell]:
    return {cell.name: cell for cell in practice_check.check(chapter, path)}


@pytest.mark.parametrize("chapter", practice.SPINE if SLOW else practice.SPINE[:1])
def test_the_right_bodies_pass(chapter):
    solved(chapter, Path("practice"))
    code, said = asked(chapter, "--check")
    count = len(bodies(chapter))
    assert code == 0 and f"{count} of {count} definitions pass" in said, said


WRONG = [(chapter, cell, name, kind) for chapter in practice.SPINE
         for cell, name in bodies(chapter) for kind in ("nothing", "off")
         if chapter == "00_layers" or kind == "off" and (chapter, name) in SAMPLE
         or SLOW and (kind == "nothing" or chapter in EVERY_RESULT) and name not in UNASSERTED]


@pytest.mark.parametrize("chapter, cell, name, kind", WRONG)
def test_a_wrong_body_is_noticed(chapter, cell, name, kind):
    found = noticed(chapter, Path("practice"), cell, name, kind)
    assert found is not None, f"no cell of {chapter} notices that {name} is wrong ({kind})"


def test_what_is_blank_or_wrong_is_said():
    """One body is right, one wrong, one no Python, one blank: each of them is named, with the cells
    that fail of it.
    """
    source = practice.code_cells(practice.read_json(practice.chapter_path("00_layers")))["rms-norm"]
    wrong_eps = source.replace("self.eps)", "1.0)")
    blank = practice.blanked(practice.code_cells(practice.read_json(
        practice.chapter_path("00_layers")))["swiglu"])[0]
    assert wrong_eps != source
    solved("00_layers", Path("practice"), **{"rms-norm": wrong_eps, "swiglu": blank})
    code, said = asked("00_layers", "--check")
    assert code == 1 and re.search("RMSNorm.forward .* cells that fail: norm-lesson, ", said), said
    assert "line 5: torch.testing.assert_close(norm(x), rms_norm_by_hand(x" in said
    assert "AssertionError: Tensor-likes are not close!" in said
    assert "waits   swiglu-lesson         for SwiGLU.__init__" in said
    assert re.search("SwiGLU.forward +to write", said) and "0 of 6 definitions pass" in said


def test_a_page_that_was_changed_is_no_check():
    """An assertion taken out, a cell deleted, a definition lost, a body that is no Python."""
    cells = practice.code_cells(practice.read_json(practice.chapter_path("00_layers")))
    weaker = cells["norm-scale-test"].replace("< 0.01", "< 100")
    path = solved("00_layers", Path("practice"), **{"norm-scale-test": weaker,
                                                    "swiglu": "#| export\ndef SwiGLU(:"})
    notebook = practice.read_json(path)
    notebook["cells"] = [cell for cell in notebook["cells"] if cell["id"] != "norm-depth-test"]
    path.write_text(json.dumps(notebook))
    found = states("00_layers", path)
    assert "an assertion of the chapter is gone" in found["norm-scale-test"].said
    assert found["norm-depth-test"].said == "the chapter's cell is gone from the page"
    assert found["swiglu"].state == "fails" and "SyntaxError" in found["swiglu"].said
    assert found["swiglu-lesson"].said == "for SwiGLU, of cell swiglu"
    verdicts = {one.name: one.said
                for one in practice_check.verdicts("00_layers", path, [*found.values()])}
    assert verdicts["SwiGLU.forward"] == "called in 1 cell that fails: swiglu"
