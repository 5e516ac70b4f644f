"""A practised page, run cell by cell: which cells pass, what fails in the others, and which
definitions they called. Imports no torch.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import ModuleType

from modern_llm.files import read_json
from modern_llm.messages import StageError
from modern_llm.runs.practice import (
    TO_WRITE, blank_cells, body_of, chapter_path, code_cells, definitions, is_blank, is_exported,
    practise,
)

SKIPPED = ("#| slow", "#| gpu", "#| eval: false")
PAGES = count(1)
CALLED = "__practised__"  # what a definition tells its name to when it is called
# A page that is a stage is run with as little training as its assertions need: the parameters that
# are put in behind its own.
SHORT = ("pretrain.max_steps=4 sft.max_steps=4 dpo.max_steps=3 verifier.max_steps=3 "
         "sft.max_train_examples=200 sft.max_validation_examples=20 dpo.max_train_pairs=40 "
         "dpo.max_validation_pairs=8 dpo.max_new_tokens=16 verifier.train_problems=8 "
         "verifier.validation_problems=6 verifier.samples_per_problem=4 "
         "verifier.validation_samples=16 verifier.max_new_tokens=16")


@dataclass
class Cell:
    """What became of a cell: it passes, or fails, or waits for something that is not there yet."""

    name: str
    state: str  # "passes", "fails" or "waits"
    asserts: bool = False
    said: str = ""  # why it does not pass
    called: set[str] = field(default_factory=set)  # the definitions that it called


@dataclass
class Verdict:
    """A definition: to write, missing, or called by the cells with assertions that pass or fail."""

    name: str
    state: str  # "to write", "missing" or "written"
    passed: list[str]
    failed: list[str]
    whole: bool = False  # the page has come to its end, every cell of it passes

    @property
    def passes(self) -> bool:
        """Whether there is nothing against it, and something for it."""
        return self.state == "written" and not self.failed and (bool(self.passed) or self.whole)

    @property
    def said(self) -> str:
        if self.state != "written":
            return self.state
        passes = f"passes in {counted(self.passed)}"
        if not self.failed:
            return passes if self.passed else "written; no cell that was reached asserts it"
        fails = f"called in {counted(self.failed)} that fail{'s' * (len(self.failed) == 1)}"
        return f"{f'{passes}, ' * bool(self.passed)}{fails}: {', '.join(self.failed)}"


def counted(cells: list[str]) -> str:
    """`1 cell`, `2 cells`."""
    return f"{len(cells)} cell{'s' * (len(cells) != 1)}"


def plain(source: str) -> str:
    """A cell without IPython's own lines, which keep their places."""
    return "\n".join("" if line.startswith(("%", "!")) else line for line in source.split("\n"))


def assertions(source: str) -> list[str]:
    """The statements of a cell that check something, wherever in it they stand, each as one line of
    plain code.
    """
    try:
        tree = ast.parse(plain(source))
    except SyntaxError:
        return []
    return [ast.unparse(node) for node in ast.walk(tree)
            if isinstance(node, ast.Assert) or isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Call)
            and re.search(r"(^|\.)assert_\w+$", ast.unparse(node.value.func))]


class Marks(ast.NodeTransformer):
    """Let the definitions of a cell tell that they were called."""

    def visit_Module(self, tree: ast.Module) -> ast.Module:
        for name, node in definitions(tree):
            place = len(node.body) - len(body_of(node))
            node.body.insert(place, ast.parse(f"{CALLED}({name!r})").body[0])
            for part in ast.walk(node.body[place]):
                ast.copy_location(part, node)
        return tree


def check(chapter: str, path: Path,
          begins: Callable[[str], None] = lambda name: None) -> Iterator[Cell]:
    """Run a practised page and yield what became of each cell as soon as it is known.

    The page runs in this process, in its own folder as in JupyterLab. One that is a stage trains
    for a few steps (`SHORT`), into a temporary folder. StageError if there is no such page.

    Args:
        begins: told the name of each cell before it runs.
    """
    cells = page_cells(chapter, path)
    hints = {said: name for found in blank_cells(chapter).values() for name, said in found.items()}
    chapters_own = code_cells(read_json(chapter_path(chapter)))
    missing: dict[str, str] = {}  # name -> the cell that did not come to define it
    with tempfile.TemporaryDirectory() as runs, shell_in(path.parent) as shell:
        called: set[str] = set()
        practise(chapter, shell.user_ns)
        shell.user_ns["__builtins__"][CALLED] = called.add
        parameters = f"overrides = ' '.join([overrides, {SHORT!r}]); output_dir = {runs!r}"
        for name, source in cells.items():
            if source.startswith(SKIPPED) or name == "practice-guard":
                continue
            begins(name)
            called.clear()
            shell.ast_transformers[:0] = [Marks()] if is_exported(source) else []
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(
                    io.StringIO()):
                result = shell.run_cell(source, silent=True)
                if chapters_own.get(name, "").startswith("preset = "):
                    shell.run_cell(parameters, silent=True)
                if "matplotlib.pyplot" in sys.modules:
                    sys.modules["matplotlib.pyplot"].close("all")
            shell.ast_transformers = [
                part for part in shell.ast_transformers if not isinstance(part, Marks)]
            error = result.error_before_exec or result.error_in_exec
            if isinstance(error, KeyboardInterrupt):
                raise error
            cell = Cell(name, "passes", bool(assertions(source)), called=set(called))
            if error is not None:
                cell.state, cell.said = explained(error, source, hints, missing)
                missing |= dict.fromkeys(assigned(source), name)
            elif gone := lost_assertions(chapters_own.get(name, ""), source):
                cell.state = "fails"
                cell.said = f"an assertion of the chapter is gone: {gone[0]}"
            if cell.state == "passes":
                for known in assigned(source):
                    missing.pop(known, None)
            yield cell
        for name, source in chapters_own.items():
            if name not in cells and assertions(source) and not is_exported(source):
                yield Cell(name, "fails", True, "the chapter's cell is gone from the page")


def page_cells(chapter: str, path: Path) -> dict[str, str]:
    """The code cells of a copy. StageError if there is none, or it is damaged."""
    if not path.is_file():
        to = "" if path.parent == Path("practice") else f" --to {shlex.quote(str(path.parent))}"
        raise StageError(f"{path} is not there: `modern-llm practice {chapter}{to}` writes it "
                         "(it is looked for from the folder you are in)")
    try:
        return code_cells(read_json(path))
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"{path} is no notebook of this project ({error}); --force writes it "
                         "again") from error


def verdicts(chapter: str, path: Path, cells: list[Cell]) -> list[Verdict]:
    """What the cells that were run say about each definition of a chapter."""
    written: dict[str, bool] = {}
    for source in page_cells(chapter, path).values():
        with contextlib.suppress(SyntaxError):
            if is_exported(source):
                written |= {name: not is_blank(node)
                            for name, node in definitions(ast.parse(source))}
    found = []
    for cell, hints in blank_cells(chapter).items():
        broken = [one.name for one in cells if one.name == cell and one.state == "fails"]
        for name in hints:
            calls = [one for one in cells if name in one.called and one.asserts]
            found.append(Verdict(
                name, {True: "written", False: "to write",
                       None: "written" if broken else "missing"}[written.get(name)],
                [one.name for one in calls if one.state == "passes"],
                broken + [one.name for one in cells
                          if name in one.called and one.state == "fails"],
                all(one.state == "passes" for one in cells)))
    return found


# ---- one cell ------------------------------------------------------------------------------------


@contextlib.contextmanager
def shell_in(folder: Path) -> Iterator:
    """An IPython shell of its own in a folder, which shows nothing; what it changes of this process
    is put back.

    Its module has a name that no other had: what a type checker remembers by name of an earlier
    page is not taken for this one's.
    """
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    before = Path.cwd(), InteractiveShell._instance, dict(os.environ)
    os.environ.setdefault("MPLBACKEND", "agg")
    module = ModuleType(f"page_{next(PAGES)}")
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}),
                             user_module=module)
    InteractiveShell._instance = shell
    os.chdir(folder)
    try:
        yield shell
    finally:
        os.chdir(before[0])
        InteractiveShell._instance = before[1]
        os.environ.clear()
        os.environ.update(before[2])
        sys.modules.pop(module.__name__, None)


def explained(error: BaseException, source: str, hints: dict[str, str],
              missing: dict[str, str]) -> tuple[str, str]:
    """("waits" or "fails", why) for a cell that raised: where in the cell, and what was said."""
    said = str(error)
    if isinstance(error, NotImplementedError) and TO_WRITE in said:
        return "waits", f"for {hints.get(said, said)}"
    if isinstance(error, NameError) and error.name in missing:
        return "waits", f"for {error.name}, of cell {missing[error.name]}"
    lines = [line for line in said.strip().splitlines() if line.strip()][:6]
    place = cell_line(error, source)
    return "fails", "\n".join([place] * bool(place) + [
        f"{type(error).__name__}{': ' * bool(lines)}{lines[0] if lines else ''}", *lines[1:]])


def cell_line(error: BaseException, source: str) -> str:
    """`line 5: assert …` for the statement of the cell that raised; "" where that is not known."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {(error.text or '').strip()}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.name == "<module>" or frame.name.startswith("<cell line")]
    if not lines or not 0 < lines[-1] <= len(source.split("\n")):
        return ""
    shown = source.split("\n")
    with contextlib.suppress(SyntaxError):
        around = [node for node in ast.walk(ast.parse(plain(source))) if isinstance(node, ast.stmt)
                  and node.lineno <= lines[-1] <= node.end_lineno]
        return f"line {lines[-1]}: {shown[max(node.lineno for node in around) - 1].strip()}"
    return f"line {lines[-1]}: {shown[lines[-1] - 1].strip()}"


def assigned(source: str) -> set[str]:
    """The names that a cell defines."""
    with contextlib.suppress(SyntaxError):
        tree = ast.parse(plain(source))
        return ({node.id for node in ast.walk(tree)
                 if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
                | {node.name for node in ast.walk(tree)
                   if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
                | {alias.asname or alias.name.split(".")[0] for node in ast.walk(tree)
                   if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names})
    return set(re.findall(r"^(?:def|class) (\w+)", source, re.M))


def lost_assertions(chapters: str, source: str) -> list[str]:
    """What a cell of the chapter asserts and its copy on the page no longer does."""
    here = assertions(source)
    return [] if is_exported(chapters) else [
        statement for statement in assertions(chapters) if statement not in here]
