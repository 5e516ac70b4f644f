"""The kept checkpoints of a stage as a folder to look at: checkpoints.csv, a curve, and what each
of them writes. torch is imported where it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modern_llm.files import DamagedFolder, atomic_folder, check_folder, read_json
from modern_llm.interchange.hub import weights_digest
from modern_llm.report.page import interval, markdown_table

if TYPE_CHECKING:
    import pandas as pd


def shown(table: pd.DataFrame) -> list[dict]:
    """The table of `compare_checkpoints` as rows of text: each number with its interval."""
    return [{"step": row["step"], "tokens": row["tokens"],
             **{f"nats per token, {kind}": interval(
                 {"value": row[f"{kind}_nats"], "low": row[f"{kind}_low"],
                  "high": row[f"{kind}_high"]})
                for kind in ("text", "answers") if f"{kind}_nats" in row},
             "bits per byte, text": interval({"value": row["bits_per_byte"]})}
            for row in table.to_dict("records")]


def sheet(made_of: dict, table: pd.DataFrame, texts: dict[str, list[str]]) -> str:
    """The comparison as a page of Markdown.

    Args:
        made_of: what `write_checkpoint_sheet` keeps beside it.
        texts: of `compare_checkpoints`.
    """
    from modern_llm.figures import sample_sheet

    sources = ", ".join(f"{name} ({fingerprint})" for name, fingerprint in made_of["text"].items())
    first = f", the first {made_of['max_tokens']} tokens of each" if made_of["max_tokens"] else ""
    answers = f", and {made_of['answers']} held-out answers" if made_of["answers"] else ""
    return "\n\n".join([
        f"# Checkpoints of {made_of['checkpoints_of']}",
        f"Held-out text of {sources}{first}{answers}; brackets are 95% intervals over documents. "
        "Below them, each prompt and what every checkpoint writes behind it, always the likeliest "
        f"token, at most {made_of['max_new_tokens']}.",
        markdown_table(shown(table)), "![Nats per token by step](checkpoints.png)",
        sample_sheet(texts).data]) + "\n"


def is_done(folder: Path, made_of: dict, force: bool) -> bool:
    """Whether `folder` holds this very comparison, unchanged; False where one is to be written.

    Raises ValueError if the folder holds anything else, unless it is a comparison and `force` says
    to write over it.
    """
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return False
    why = "is of other checkpoints, text or prompts"
    try:
        meta = read_json(folder / "meta.json")
        same = {name: meta.get(name) for name in made_of} == made_of
        ours = "checkpoints_of" in meta
        check_folder(folder)
    except DamagedFolder as error:
        same, why = False, f"was changed by hand: {error}"
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise ValueError(f"{folder} holds something else: choose another place with --to DIR")
    if not same and not force:
        raise ValueError(f"{folder} {why}; --force writes it anew, --to DIR leaves it as it is")
    return not force


def write_checkpoint_sheet(
    stage_folder: Path, folder: Path | None = None, prompts: Sequence[str] = (),
    max_new_tokens: int = 48, max_tokens: int | None = None, device: str = "cpu",
    force: bool = False, progress: bool = False,
) -> tuple[pd.DataFrame, Path, bool]:
    """Compare the kept checkpoints of a stage and write checkpoints.csv, checkpoints.png and
    checkpoints.md; nothing is computed where the same comparison is there.

    Args:
        stage_folder: such as runs/local-smoke/pretrain.
        folder: where to; None is runs/local-smoke/pretrain-checkpoints.
        prompts: to go on with, or to answer; none: `HeldOut.prompts`.
        max_tokens: of each source of held-out text; None for all.
        force: measure anew, and write over another comparison.

    Returns:
        The table of `compare_checkpoints`, the folder, and whether it was written now.
    """
    import pandas as pd

    from modern_llm.evaluation.charts import checkpoint_curve
    from modern_llm.evaluation.checkpoint_table import (
        HeldOut, compare_checkpoints, kept_checkpoints,
    )
    from modern_llm.figures import small_png

    checkpoints = kept_checkpoints(stage_folder)
    folder = folder or stage_folder.with_name(f"{stage_folder.name}-checkpoints")
    held_out = HeldOut.of(stage_folder, checkpoints[-1][1])
    prompts = list(prompts) or held_out.prompts()
    made_of = {"checkpoints_of": f"{stage_folder.parent.name}/{stage_folder.name}",
               "weights": {str(step): weights_digest(place) for step, place in checkpoints},
               "text": {name: cache.fingerprint for name, cache in held_out.texts.items()},
               "answers": len(held_out.answers), "prompts": prompts,
               "max_new_tokens": max_new_tokens, "max_tokens": max_tokens}
    if is_done(folder, made_of, force):
        return pd.read_csv(folder / "checkpoints.csv"), folder, False
    with atomic_folder(folder, made_of) as temporary:  # first: it may not be writable
        table, texts = compare_checkpoints(checkpoints, held_out, prompts, max_new_tokens,
                                           max_tokens, device, progress)
        table.to_csv(temporary / "checkpoints.csv", index=False)
        (temporary / "checkpoints.png").write_bytes(
            small_png(checkpoint_curve(table, held_out.floor(max_tokens))))
        (temporary / "checkpoints.md").write_text(sheet(made_of, table, texts), encoding="utf-8")
    return table, folder, True
