"""Build the documentation site from the notebooks, the package's docstrings and the reports:
`make docs`.

Nothing is executed and nothing is fetched: chapters show their stored outputs, the reference is
read from the sources. The pages are written to `_docs/source`, in the layout of the repository, and
Sphinx makes `_docs/html` of them; what has not changed is not built again. The numbers of a report
whose items are published are links to them.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "_docs"
SOURCE = OUT / "source"
PACKAGE = ROOT / "modern_llm"
MATHJAX = "sphinx-mathjax-offline"
TOOLS = ("sphinx", "furo", "myst_nb", "sphinx_copybutton", MATHJAX)
LANGUAGE = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}
written: set[Path] = set()


def write(name: str, content: str | bytes) -> bool:
    """Write a page, and say whether it changed; an unchanged one keeps its time, by which Sphinx
    tells what to build.
    """
    path, data = SOURCE / name, content.encode() if isinstance(content, str) else content
    written.add(path)
    if changed := not path.exists() or path.read_bytes() != data:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return changed


# The package, as its sources tell it


# the tens of a chapter's number
SHELVES = {1: "The model", 2: "The data", 3: "Training", 4: "Evaluation", 5: "Experiments",
           6: "Extending", 7: "Guides"}


def shelf(order: float) -> str:
    """The group of chapters that one belongs to, by its place in the reading order."""
    return ("The spine" if order < 10
            else f"Shelf {order // 10:.0f}x: {SHELVES[order // 10].lower()}")


def dotted_name(path: Path) -> str:
    """`models.layers` for modern_llm/models/layers.py, `models` for its folder's face."""
    return ".".join(
        part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__")


class Module:
    """A module of the package: its syntax tree, its public names and the chapter cell each one
    comes from.
    """

    def __init__(self, path: Path):
        self.name, text = dotted_name(path), path.read_text(encoding="utf-8")
        self.is_face = path.name == "__init__.py"
        self.tree = ast.parse(text)
        self.lines = text.splitlines()
        self.doc = ast.get_docstring(self.tree) or ""
        self.cells: dict[str, str] = {}  # public name -> id of the cell that defines it
        self.definitions: dict[str, ast.stmt] = {}
        headers = [(i, m) for i, line in enumerate(self.lines, 1)
                   if (m := re.match(r"# %% (?:\.\./)+nbs/(\S+)\.ipynb #(\S+)", line))]
        self.chapter = headers[0][1][1] if headers else ""
        for node in self.tree.body:
            for name in defined(node):
                self.definitions[name] = node
                self.cells[name] = next((m[2] for i, m in reversed(headers) if i < node.lineno), "")

    def comment(self, node: ast.stmt, line: int) -> str:
        """What a field or constant is: the comment behind it, or the lines of comment right above
        it.
        """
        _, _, text = self.lines[line - 1].partition("  # ")
        first = node.lineno - 1
        while (not text and first and self.lines[first - 1].lstrip().startswith("# ")
               and "# %%" not in self.lines[first - 1]):
            first -= 1
        return text or " ".join(line.strip().removeprefix("# ")
                                for line in self.lines[first:node.lineno - 1])

    def exported_by(self, cell: str) -> list[str]:
        return [name for name, where in self.cells.items() if where == cell]


def defined(node: ast.stmt) -> list[str]:
    """The public names a statement of a module defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        names = [node.name]
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [name.id for target in targets
                 for name in ast.walk(target) if isinstance(name, ast.Name)]
    else:
        names = []
    return [name for name in names if not name.startswith("_")]


# The reference


def prose(text: str) -> str:
    """A docstring's text as Markdown: backticks and *stress* are marks, a paragraph below a \\b, as
    `click` has it, keeps its lines, everything else is taken literally.
    """
    kept = r"\x08\n((?:.+\n?)+)"
    if found := re.search(kept, text):
        before, after = text[:found.start()], text[found.end():]
        return f"{prose(before)}```text\n{found[1].rstrip()}\n```\n{prose(after)}"
    parts = re.split(r"(`[^`]*`|(?<!\w)\*\w+\*(?!\w))", text)
    return "".join(part if i % 2 else re.sub(r"([\\*_<>$\[\]{}#|])", r"\\\1", part)
                   for i, part in enumerate(parts))


def docstring(node: ast.AST) -> str:
    """A docstring as Markdown, its sections (Args, Returns, Raises) as field lists."""
    sections = re.split(r"^(Args|Returns|Raises):\n", ast.get_docstring(node) or "", flags=re.M)
    parts = [prose(sections[0].strip())]
    for title, body in zip(sections[1::2], sections[2::2]):
        inside = re.match(r"(?:(?: .*)?\n|(?: .*)$)*", body)[0]
        items = re.split(r"\n(?=\S)", "\n".join(line[4:] for line in inside.rstrip().splitlines()))
        if title == "Returns":
            fields = [":returns: " + prose(" ".join(" ".join(items).split()))]
        else:
            pairs = [item.partition(":") for item in items]
            role = "param" if title == "Args" else "raises"
            fields = [f":{role} {name.strip()}: {prose(' '.join(text.split()))}"
                      for name, _, text in pairs]
        parts += ["\n".join(fields), prose(body[len(inside):].strip())]
    return "\n\n".join(part for part in parts if part)


def directive(kind: str, signature: str, content: str, depth: int, **options: str) -> str:
    fence = "`" * (8 - depth)
    lines = [f"{fence}{{py:{kind}}} {signature}",
             *(f":{name}: {value}" for name, value in options.items()), "", content, fence]
    return "\n".join(lines) + "\n"


def function(node: ast.FunctionDef, module: str, content: str = "", depth: int = 0) -> str:
    arguments = node.args
    if depth and arguments.args and arguments.args[0].arg in ("self", "cls"):
        arguments.args.pop(0)
    decorators = {ast.unparse(d) for d in node.decorator_list}
    kind = "property" if "property" in decorators else "method" if depth else "function"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    options = ({"module": module}
               | {name: "" for name in ("classmethod", "staticmethod") if name in decorators})
    if kind == "property":
        return directive(kind, node.name, docstring(node), depth, module=module,
                         **({"type": returns[4:]} if returns else {}))
    return directive(kind, f"{node.name}({ast.unparse(arguments)}){returns}",
                     content + docstring(node), depth, **options)


def class_(node: ast.ClassDef, module: Module, content: str) -> str:
    path, inside, signature = f"modern_llm.{module.name}", [], ""
    for child in node.body:
        if isinstance(child, ast.FunctionDef) and child.name == "__init__":
            child.args.args.pop(0)
            signature = f"({ast.unparse(child.args)})"
        elif isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
            inside.append(function(child, path, depth=1))
        elif isinstance(child, ast.AnnAssign):
            # a field of a dataclass: its comment is its documentation
            comment = module.comment(child, child.end_lineno)
            options = ({"type": ast.unparse(child.annotation)}
                       | ({"value": ast.unparse(child.value)} if child.value else {}))
            inside.append(directive("attribute", child.target.id,
                                    prose(comment), 1, module=path, **options))
    return directive("class", node.name + signature,
                     "\n\n".join([content + docstring(node), *inside]), 0, module=path)


def reference(module: Module, titles: dict[str, str]) -> str:
    """The page of a module: every public name with its signature, its docstring and the cell that
    defines it.
    """
    path = f"modern_llm.{module.name}"
    page = [f"# {module.name}", f"```{{py:module}} {path}\n```",
            *(f"> {prose(line)}" for line in module.doc.split("\n\n")[:1]),
            *map(prose, module.doc.split("\n\n")[1:])]
    if module.chapter:
        page.append(
            f"Written in the chapter [{titles[module.chapter]}](../nbs/{module.chapter}.ipynb).")
    for name, node in module.definitions.items():
        where = ""
        if module.chapter:
            where = (f"{{.defined}}\nDefined in {{ref}}`{titles[module.chapter]} "
                     f"<{module.chapter}.{module.cells[name]}>`\n\n")
        if isinstance(node, ast.ClassDef):
            page.append(class_(node, module, where))
        elif isinstance(node, ast.FunctionDef):
            page.append(function(node, path, where))
        elif name == "PLACES" and module.is_face:  # what a folder offers, and where it is defined
            page.append("Offers " + ", ".join(f"{{py:obj}}`{offered} <{path}.{place}.{offered}>`"
                        for offered, place in ast.literal_eval(node.value).items()) + ".")
        else:
            value, comment = ast.unparse(node.value), module.comment(node, node.lineno)
            page.append(directive("data", name, where + prose(comment), 0, module=path,
                                  **({"value": value} if len(value) < 100 else {})))
    return "\n\n".join(page) + "\n"


# The chapters


def chapter(path: Path, notebook: dict, modules: dict[str, Module]) -> str:
    """A chapter as the reader sees it: directives become marks, exported cells say what they
    define, hidden ones are folded.
    """
    cells, module = [], None
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        match = re.match(r"#\| ?(\w+):? ?(.*)\n?", source)
        kind, argument = match.groups() if match else ("", "")
        source = source[match.end():] if match else source
        if kind == "default_exp":
            module = modules[argument]
            cells.append(markdown(
                "module-source", f"The source of [`modern_llm.{argument}`](../api/{argument}.md)."))
            continue
        if kind == "export" and (names := module.exported_by(cell["id"])):
            links = ", ".join(f"{{py:obj}}`{name} <modern_llm.{module.name}.{name}>`"
                              for name in names)
            cells.append(markdown(f"exported-{len(cells)}", f"({path.stem}.{cell['id']})=\n\n"
                                                            f"{{.exported}}\nExported: {links}"))
        tags = {"hide": ["hide-cell"], "echo": ["remove-input"]}.get(kind, [])
        if source.startswith("# ") and not cells:
            source = re.sub(r"\n- order: \S+", "", source).rstrip()
            if path.stem != "index":
                source += ("\n\n{.download}\n"
                           f"{{download}}`Download the notebook <../files/{path.name}>`")
        cells.append({**cell, "source": source, "metadata": {"tags": tags} if tags else {}})
        for output in cell.get("outputs", []):
            if html := output.get("data", {}).get("text/html"):
                output["data"]["text/html"] = re.sub(r"<style scoped>.*?</style>\n?", "",
                                                     "".join(html), flags=re.S)
    return json.dumps({**notebook, "cells": cells, "metadata": LANGUAGE})


def markdown(identifier: str, source: str) -> dict:
    return {"cell_type": "markdown", "id": identifier, "metadata": {}, "source": source}


def front_page(notebook: dict, groups: dict[str, dict[str, str]],
               modules: dict[str, Module]) -> str:
    """`index.ipynb`, its links turned to this site, and the table of contents the side bar shows.
    """
    def turned(text: str) -> str:
        text = re.sub(r"\[([^\]]+)\]\(\.\./modern_llm/([\w/]+)\.py#(\w+)\)",
                      lambda m: f"{{py:obj}}`{m[1]} <modern_llm.{m[2].replace('/', '.')}.{m[3]}>`",
                      text)
        return text.replace("](../", "](")

    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = turned("".join(cell["source"]))
        for output in cell.get("outputs", []):
            if text := output.get("data", {}).get("text/markdown"):
                output["data"]["text/markdown"] = turned("".join(text))
    reports = [f"report/{path.stem}" for path in sorted((ROOT / "report").glob("*.md"))]
    contents = {
        group: [f"{stem.split('_')[0]} {title} <nbs/{stem}>" for stem, title in book.items()]
        for group, book in groups.items()}
    contents |= {"Reports": reports, "Reference": [f"api/{name}" for name in modules]}
    toctrees = [f"```{{toctree}}\n:hidden:\n:maxdepth: 1\n:caption: {caption}\n\n{lines}\n```"
                for caption, lines in ((caption, "\n".join(entries))
                                       for caption, entries in contents.items())]
    notebook["cells"].append(markdown("contents", "\n\n".join(toctrees)))
    return chapter(ROOT / "nbs" / "index.ipynb", notebook, modules)


def sources() -> bool:
    """Write all pages; remove those that nothing writes any more. Returns whether the order of the
    pages may have changed, which every page shows.
    """
    notebooks = {path: json.loads(path.read_text(encoding="utf-8"))
                 for path in (ROOT / "nbs").glob("*.ipynb")}
    index = notebooks.pop(ROOT / "nbs" / "index.ipynb")
    first = {path: "".join(notebook["cells"][0]["source"]) for path, notebook in notebooks.items()}
    order = {path: float(re.search(r"^- order: (\S+)", text, re.M)[1])
             for path, text in first.items()}
    book = {path.stem: first[path].splitlines()[0].removeprefix("# ")
            for path in sorted(notebooks, key=lambda p: (order[p], p.name))}
    groups: dict[str, dict[str, str]] = {}
    for path in sorted(notebooks, key=lambda p: (order[p], p.name)):
        groups.setdefault(shelf(order[path]), {})[path.stem] = book[path.stem]
    found = [Module(path) for path in sorted(PACKAGE.rglob("*.py"))
             if "tests" not in path.parts and path.name != "_modidx.py"
                and path != PACKAGE / "__init__.py"]
    found.sort(key=lambda m: (list(book).index(m.chapter) if m.chapter else len(book), m.name))
    modules = {m.name: m for m in found}

    reordered = write("index.ipynb", front_page(index, groups, modules))
    for path, notebook in notebooks.items():
        write(f"files/{path.name}", path.read_bytes())
        write(f"nbs/{path.name}", chapter(path, notebook, modules))
    for module in modules.values():
        write(f"api/{module.name}.md", reference(module, book))
    sys.path.insert(0, str(ROOT))  # what reads the reports is of their checkout
    from modern_llm.report.item_pages import site_pages

    pages, without = site_pages(ROOT / "report")
    for name, text in pages.items():
        write(f"report/{name}", text)
    if without:
        print(f"No items are published beside {', '.join(without)}: the numbers of their reports "
              "are no links")
    for path in (ROOT / "report").rglob("*"):
        if (path.suffix in (".md", ".png", ".svg", ".csv", ".json", ".html", ".gz")
                and SOURCE / path.relative_to(ROOT) not in written):
            write(str(path.relative_to(ROOT)), path.read_bytes())
    for path in SOURCE.rglob("*"):
        if path.is_file() and path not in written:
            path.unlink()
    return reordered


def mathjax(package: Path) -> None:
    """Take MathJax from the installed package: one script and its fonts, so that formulas need no
    network either.
    """
    for name in ("tex-chtml-full.js", "output/chtml/fonts/woff-v2"):
        source, target = package / "static" / "mathjax" / name, OUT / "static" / "mathjax" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree(source, target, dirs_exist_ok=True) if source.is_dir()
         else shutil.copy2(source, target))


def main() -> int:
    if missing := [name for name in TOOLS if not find_spec(name)]:
        print(f"{', '.join(missing)} missing: `make docs` installs what the site needs (or pip "
              "install -e '.[docs]')", file=sys.stderr)
        return 1
    everything = ["-a"] if sources() else []
    mathjax(Path(find_spec(MATHJAX).origin).parent)
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going", "-j",
               "auto", "-c", str(ROOT / "docs"), "-d", str(OUT / "doctrees"),
               str(SOURCE), str(OUT / "html")]
    code = subprocess.run([*command, *everything, *sys.argv[1:]]).returncode
    if not code:
        print(f"The site is in {OUT / 'html'}: open index.html, or for its search to work\n"
              f"  {sys.executable} -m http.server -d {OUT / 'html'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
