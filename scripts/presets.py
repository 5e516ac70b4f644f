"""Write every preset as `configs/NAME.json`, with underscores for hyphens: `make export`."""

import json
from pathlib import Path

from modern_llm.config import ALIASES, PRESETS, get_pipeline_preset, to_dict
from modern_llm.files import write_text

FOLDER = Path(__file__).resolve().parent.parent / "configs"


def file_of(name: str) -> Path:
    """The file of a preset or of another name that it has."""
    return FOLDER / f"{name.replace('-', '_')}.json"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for preset in (*PRESETS, *ALIASES):
        values = to_dict(get_pipeline_preset(preset))
        write_text(file_of(preset), json.dumps(values, indent=2) + "\n")
