"""Write README.md from nbs/index.ipynb: its prose, its code and its stored text outputs. `--check`
only compares.
"""

import ast
import re
import sys
from pathlib import Path

import nbformat

root = Path(__file__).resolve().parent.parent


def turned(text: str) -> str:
    """Links of a page in nbs/ as links from the repository root; `module.py#name` becomes the line
    where the name is defined.
    """
    def line(link: re.Match) -> str:
        tree = ast.parse((root / link[1]).read_text(encoding="utf-8"))
        return f"]({link[1]}#L{next(node.lineno for node in tree.body if getattr(node, 'name', '') == link[2])})"

    return re.sub(r"\]\((modern_llm/[\w/]+\.py)#(\w+)\)", line, text.replace("](../", "]("))


def readme() -> str:
    """The index notebook as Markdown."""
    notebook = nbformat.read(root / "nbs" / "index.ipynb", as_version=4)
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(turned(cell.source))
        else:
            if not cell.source.startswith("#|"):
                parts.append(f"```python\n{cell.source}\n```")
            for output in cell.outputs:
                data = output.get("data", {})
                if "text/markdown" in data:
                    parts.append(turned(data["text/markdown"]))
                elif text := output.get("text") or data.get("text/plain"):
                    parts.append(f"```text\n{text.rstrip()}\n```")
    return ("<!-- Written from nbs/index.ipynb by `make export`; edit that. -->\n"
            + "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    target = root / "README.md"
    if "--check" in sys.argv:
        sys.exit(target.read_text(encoding="utf-8") != readme()
                 and "README.md is not what nbs/index.ipynb says: make export")
    target.write_text(readme(), encoding="utf-8")
