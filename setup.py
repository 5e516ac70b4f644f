"""Packaging: every fact comes from `settings.ini`, the file nbdev reads too."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
settings = ConfigParser(delimiters=["="])
settings.read(root / "settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]

(setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["modern_llm", "modern_llm.*"],
                           exclude=["modern_llm.tests", "modern_llm.tests.*"]),
    package_data={"modern_llm": ["*.mplstyle"], "modern_llm.config": ["clusters/*.toml"],
                  "modern_llm.report": ["*.html"], "modern_llm.serving": ["*.html"]},
    install_requires=cfg["requirements"].split(),
    extras_require={name: cfg[f"{name}_requirements"].split()
                    for name in ("dev", "baselines", "docs", "browser", "agreement", "peers",
                                 "serve", "clients", "tensorboard", "trackio")},
    entry_points={"console_scripts": cfg["console_scripts"].split(),
                  "papermill.engine": ["modern_llm=modern_llm.runs.refusals:Engine"],
                  "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
))
