"""Sphinx settings of the documentation site; `docs/build.py` writes the pages."""

from configparser import ConfigParser
from functools import cache
from pathlib import Path

from sphinx.pycode import ModuleAnalyzer

root = Path(__file__).resolve().parent.parent
settings = ConfigParser(delimiters=["="])
settings.read(root / "settings.ini", encoding="utf-8")

project, author, version = (settings["DEFAULT"][name] for name in ("title", "author", "version"))
project_copyright = settings["DEFAULT"]["copyright"]
extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx_copybutton", "sphinx.ext.viewcode"]
exclude_patterns = ["files"]
suppress_warnings = ["ref.python"]  # a type in a signature may be defined in two modules

nb_execution_mode = "off"
nb_code_prompt_show = nb_code_prompt_hide = "Set-up and further tests"
nb_render_markdown_format = "myst"
myst_enable_extensions = ["amsmath", "attrs_block", "dollarmath", "fieldlist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = project
html_static_path = ["static", "../_docs/static"]
html_favicon = "static/icon.svg"
html_css_files = ["site.css"]
mathjax_path = "mathjax/tex-chtml-full.js"  # build.py puts it into _docs/static
mathjax3_config = {"options": {"enableMenu": False}}
html_show_sphinx = html_copy_source = html_show_sourcelink = False
python_maximum_signature_line_length = 90
add_module_names = False
pygments_style, pygments_dark_style = "tango", "monokai"
viewcode_follow_imported_members = False


@cache
def tagged_source(name):
    """A module's text and the lines of its definitions, read from its file: nothing is imported."""
    place = root / name.replace(".", "/")
    path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    source = path.read_text(encoding="utf-8")
    return source, ModuleAnalyzer.for_string(source, name).find_tags()


def setup(app):
    app.connect("viewcode-find-source", lambda app, name: tagged_source(name))
