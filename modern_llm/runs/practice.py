"""A chapter to practise: its copy in which the bodies of the exported definitions are blank, and a
namespace that the chapter's own module does not reach. `practice_check` runs it. Imports no torch.

In the copy, the reader's code is a namespace and the package stays what it is. An import written on
the page gives, in place of what the chapter's own module defines, what the page defines under that
name, through whichever module it came (`Practised`); the package's modules go on importing each
other. So decoding, saving or a stage around the page work while half of it is still blank, and what
fails is the code in view, not a module three imports away. It is also how the chapter itself is
run: its cells define everything anew, and meet the package only through imports.
"""

from __future__ import annotations

import ast
import builtins
import copy
import json
import os
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from urllib.parse import quote

from modern_llm.config import ConfigError, nearest
from modern_llm.files import read_json, write_text
from modern_llm.messages import StageError
from modern_llm.runs.spec import notebooks_folder

SPINE = ("00_layers", "01_attention", "02_model", "02a_data", "02b_optim", "03_trainer",
         "03_pretrain", "04_sft", "05_dpo", "06_verifier", "07_eval", "08_attention_viz")
TO_WRITE = "is yours to write"  # what every blank says
Function = ast.FunctionDef | ast.AsyncFunctionDef

INTRODUCTION = """\
**This is a copy to practise on.** The bodies of the definitions that the chapter exports are yours
to write: each raises `NotImplementedError` until you do. All else is the chapter's. Its assertions
are the check; in a terminal, in the folder where the copy was made,

```
modern-llm practice {chapter} --check{where}
```

runs this page and says which definitions pass. The next cell keeps the package's own solution out:
an import of it gives what you wrote here. The solution is [the chapter]({solution})."""
GUARD = """\
#| hide
from modern_llm.runs.practice import practise

practise("{chapter}", globals())"""


def chapter_path(chapter: str) -> Path:
    """The notebook of a chapter of the spine. ConfigError naming the nearest one."""
    name = chapter.removesuffix(".ipynb")
    if name not in SPINE:
        raise ConfigError(f"chapter {chapter!r} is none of the spine{nearest(name, SPINE)}")
    return notebooks_folder() / f"{name}.ipynb"


def code_cells(notebook: dict) -> dict[str, str]:
    """The code cells of a notebook by their ids, in order."""
    return {cell["id"]: "".join(cell["source"]) for cell in notebook["cells"]
            if cell["cell_type"] == "code"}


def is_exported(source: str) -> bool:
    """Whether a cell is part of the chapter's module."""
    return source.startswith(("#| export\n", "#| exporti\n"))


def own_module(chapter: str) -> str:
    """The module that a chapter exports, such as modern_llm.models.layers."""
    for source in code_cells(read_json(chapter_path(chapter))).values():
        if found := re.match(r"#\| default_exp (\S+)", source):
            return f"modern_llm.{found[1]}"
    raise ConfigError(f"chapter {chapter!r} exports nothing")


# ---- blanks --------------------------------------------------------------------------------------


def definitions(tree: ast.AST, inside: str = "") -> Iterator[tuple[str, Function]]:
    """(name, node) of all functions and methods in some code, as `RMSNorm.forward`; not of those
    inside of a function.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from definitions(node, f"{inside}{node.name}.")
        elif isinstance(node, Function):
            yield f"{inside}{node.name}", node
        elif isinstance(node, (ast.If, ast.Try)):
            yield from definitions(node, inside)


def body_of(node: Function) -> list[ast.stmt]:
    """The statements of a function behind its docstring."""
    return node.body[ast.get_docstring(node, clean=False) is not None:]


def is_blank(node: Function) -> bool:
    """Whether a function does nothing but say that it is not written."""
    kinds = (ast.Pass, ast.Expr, ast.Raise)
    return all(isinstance(statement, kinds) and (
        not isinstance(statement, ast.Raise) or "NotImplementedError" in ast.unparse(statement))
        and (not isinstance(statement, ast.Expr) or isinstance(statement.value, ast.Constant))
        for statement in body_of(node))


def hint(name: str, node: Function) -> str:
    """What a blank says: which definition it is, and for a class the attributes that others read.
    """
    text = f"{name} {TO_WRITE}"
    if node.name != "__init__":
        return text
    attributes = dict.fromkeys(
        part.attr for statement in body_of(node) for part in ast.walk(statement)
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)
        and isinstance(part.value, ast.Name) and part.value.id == "self")
    steps = ["call super().__init__()"] * ("super().__init__" in ast.unparse(node))
    if attributes:
        steps.append(f"set {', '.join(f'self.{attribute}' for attribute in attributes)}")
    return f"{text}: {', then '.join(steps)}" if steps else text


def blanked(source: str) -> tuple[str, dict[str, str]]:
    """The code of a cell with all bodies blank, and what each blank says, by name. What a body
    says in comments goes with it.
    """
    lines, hints = source.split("\n"), {}
    # from the last to the first, so that line numbers keep their meaning
    for name, node in sorted(definitions(ast.parse(source)), key=lambda found: -found[1].lineno):
        if is_blank(node):
            continue
        hints[name] = hint(name, node)
        statement = body_of(node)[0]
        first = min([statement.lineno, *(part.lineno for part in
                                         getattr(statement, "decorator_list", []))]) - 1
        head = lines[first][:statement.col_offset] if first == statement.lineno - 1 else ""
        while not head.strip() and lines[first - 1].strip().startswith("#"):
            first -= 1
        indent = " " * (node.col_offset + 4)
        raised = f'{indent}raise NotImplementedError({json.dumps(hints[name])})'
        if len(raised) > 100:
            *parts, last = textwrap.wrap(hints[name], 100 - len(indent) - 8)
            parts = [*(json.dumps(f"{part} ") for part in parts), json.dumps(last)]
            raised = f"\n{indent}    ".join([f"{indent}raise NotImplementedError(", *parts]) + ")"
        lines[first:node.end_lineno] = [*filter(str.strip, [head.rstrip()]), *raised.split("\n")]
    return "\n".join(lines), {name: hints[name] for name in reversed(hints)}


def blank_cells(chapter: str) -> dict[str, dict[str, str]]:
    """What the blanks of a chapter say, by cell and name; cells without any are left out."""
    cells = code_cells(read_json(chapter_path(chapter)))
    found = {cell: blanked(source)[1] for cell, source in cells.items() if is_exported(source)}
    return {cell: hints for cell, hints in found.items() if hints}


# ---- the copy ------------------------------------------------------------------------------------


def practice_copy(chapter: str, folder: Path) -> dict:
    """The notebook to practise on, as it is written to a folder: bodies blank, outputs left out,
    links leading back to the chapters.
    """
    source = chapter_path(chapter)
    notebook = copy.deepcopy(read_json(source))
    # a link of Markdown ends at a blank
    chapters = quote(Path(os.path.relpath(source.parent, folder.resolve())).as_posix())
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
            text = blanked(text)[0] if is_exported(text) else text
        else:
            text = re.sub(r"\]\((?!\w+:|#|/)", f"]({chapters}/", text)
        cell["source"] = text.splitlines(keepends=True)
    where = "" if folder == Path("practice") else f" --to {shlex.quote(str(folder))}"
    said = INTRODUCTION.format(chapter=source.stem, where=where,
                               solution=f"{chapters}/{source.name}")
    first = [{"cell_type": "markdown", "id": "practice-text", "metadata": {},
              "source": said.splitlines(keepends=True)},
             {"cell_type": "code", "id": "practice-guard", "metadata": {}, "outputs": [],
              "execution_count": None,
              "source": GUARD.format(chapter=source.stem).splitlines(keepends=True)}]
    notebook["cells"][1:1] = first
    return notebook


def write_copy(chapter: str, folder: Path, force: bool = False) -> tuple[Path, bool]:
    """Write a chapter's copy into a folder; (its path, whether it was written).

    A copy that is there as it would be written is left alone. StageError if it is there and other:
    without `force` nothing of the reader's is overwritten, and with it no chapter is.
    """
    path, notebook = folder / chapter_path(chapter).name, practice_copy(chapter, folder)
    if path.resolve() == chapter_path(chapter).resolve():
        raise StageError(f"{path} is the chapter itself: choose another folder with --to")
    if path.exists() and not force:
        try:
            there = [("".join(cell["source"])) for cell in read_json(path)["cells"]]
        except (ValueError, KeyError, TypeError):
            there = []
        if there == ["".join(cell["source"]) for cell in notebook["cells"]]:
            return path, False
        raise StageError(f"{path} is there and was changed: it is left as it is. `--to FOLDER` "
                         "writes a fresh copy elsewhere, --force overwrites this one; --check runs "
                         "it")
    folder.mkdir(parents=True, exist_ok=True)
    return write_text(path, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"), True


# ---- imports -------------------------------------------------------------------------------------


class Practised(ModuleType):
    """A module of the package as the page sees it: what the practised module defines is taken from
    the page, wherever it is found.
    """

    def __init__(self, module: ModuleType, own: str, namespace: dict):
        vars(self).update(__name__=module.__name__, __doc__=module.__doc__, _module=module,
                          _own=own, _namespace=namespace)

    def __getattr__(self, name: str):
        value = getattr(self._module, name)
        if isinstance(value, ModuleType) and value.__name__.startswith("modern_llm"):
            return Practised(value, self._own, self._namespace)
        # what was defined has a qualified name, an object made of a class has none
        if getattr(value, "__module__", None) != self._own or not hasattr(value, "__qualname__"):
            return value
        defined = value.__qualname__.partition(".")[0]
        if defined not in self._namespace:
            raise ImportError(f"{defined} of {self._own} is what this page practises: define it "
                              "above, in its own cell, and run that cell first")
        return self._namespace[defined]

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._module, name, value)

    def __dir__(self) -> list[str]:
        return dir(self._module)


def practise(chapter: str, namespace: dict) -> None:
    """From now on, imports in a namespace do not reach what the chapter's module defines, but what
    the namespace itself does; imports inside of the package stay as they are.
    """
    own = own_module(chapter)

    def imported(name, *where, **options):
        module = builtins.__import__(name, *where, **options)
        if module.__name__.partition(".")[0] == "modern_llm":
            return Practised(module, own, namespace)
        return module

    namespace["__builtins__"] = {**vars(builtins), "__import__": imported}
