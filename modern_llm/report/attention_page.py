"""The attention of a model as one page of HTML that needs nothing else: every head's map of a few
texts, at every checkpoint. torch is imported where it is needed.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modern_llm.config import GENERATORS
from modern_llm.files import read_record, write_text
from modern_llm.interchange.hub import find_checkpoint

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

LONGEST = 64  # tokens of a text; a map has their square
PROTOCOL = (
    "{rows} texts of {length} different random tokens, twice, against {rows} whose second half is "
    "new. Sink: mean weight on the first token and a learned sink; previous: on the token before; "
    "induction: on the token behind the first occurrence, less the same without a repetition. Lost "
    "without it: how much less the repetition saves, in nats per token of the second half, with "
    "this head's output set to 0; 95% interval over texts. Repetition saves: with all heads.")


def packed(weights: Float[Tensor, "l h t s"]) -> str:
    """The rows of all heads up to their diagonals as base64, one byte a weight: 255 times its
    square root, so that faint weights keep their size; at most 0.004 off.
    """
    import torch

    t = weights.shape[-1]
    rows, columns = torch.tril_indices(t, t)
    roots = (weights[..., rows, columns].clamp(0, 1).sqrt() * 255).round().to(torch.uint8)
    return base64.b64encode(roots.flatten().numpy().tobytes()).decode("ascii")


def checkpoints_of(place: Path) -> list[tuple[str, Path]]:
    """Name and folder of all kept checkpoints of a run or of one stage, in the order they were
    trained; of anything else, the one model that it is. StageError says what was tried.
    """
    from modern_llm.evaluation.checkpoint_table import kept_checkpoints

    stages = ([place] if place.name in GENERATORS and (place / "checkpoint").is_dir()
              else [place / name for name in reversed(GENERATORS) if (place / name).is_dir()]
              if (place / "run.json").is_file() else [])
    found = [(f"{stage.name}, step {step}", folder) for stage in stages
             for step, folder in kept_checkpoints(stage)]
    return found or [(place.name, find_checkpoint(place))]


def attention_page(checkpoints: Sequence[tuple[str, Path]], target: Path, title: str,
                   texts: Sequence[str] = (), device: str = "cpu") -> Path:
    """Write the page: texts, heads and checkpoints to choose from, and each head's scores; these
    also as a table, a row a checkpoint and head, in a .csv of the same name.

    Args:
        checkpoints: name and folder, in the order of the slider; models of one shape, of one
            tokenizer.
        target: the file to write.
        title: what the page is called.
        texts: to look at, besides random tokens that are said twice; none: the built-in examples of
            an entity and of a sum, or plain English for a model of other text.

    Raises:
        ValueError: the models differ in layers, heads or tokenizer, or a text has more than
            LONGEST tokens.
    """
    import pandas as pd
    import torch

    from modern_llm.data.tokens import end_of_text_id, load_tokenizer, tokenizer_digest
    from modern_llm.evaluation.attention import attention_maps, planted_repetition
    from modern_llm.evaluation.head_film import head_scores, ordinary_tokens
    from modern_llm.models.saving import load_model

    tokenizer = load_tokenizer(checkpoints[0][1])
    start, ordinary = end_of_text_id(tokenizer), ordinary_tokens(tokenizer)
    shape, views, tables, length, rows = None, [], [], 0, 32
    shown: dict[str, list[int]] = {}
    for name, folder in checkpoints:
        model = load_model(folder, device=device).eval()
        cfg = model.cfg
        if shape is None:
            shape, length = (cfg.num_layers, cfg.num_heads), min(24, (cfg.context_length - 1) // 2)
            for text in texts or default_texts(folder):
                ids = [start, *tokenizer.encode(text, add_special_tokens=False).ids]
                if len(ids) > min(LONGEST, cfg.context_length):
                    raise ValueError(f"the text {text[:40]!r} has {len(ids)} tokens with the start "
                                     f"token, and a map {min(LONGEST, cfg.context_length)} at "
                                     "most: use a shorter one")
                shown[text] = ids
            half = min(12, length)
            shown[f"{half} random tokens, twice"] = planted_repetition(
                ordinary, half, 1, start)[0][0].tolist()
        if (shape != (cfg.num_layers, cfg.num_heads)
                or tokenizer_digest(load_tokenizer(folder)) != tokenizer_digest(tokenizer)):
            raise ValueError(f"{folder} has other layers, heads or tokens than "
                             f"{checkpoints[0][1]}: put models of one family on a page")
        scores = head_scores(model, ordinary, start, length, rows)
        saved = scores.attrs["saved"]
        tables.append(scores.reset_index().assign(
            checkpoint=name, saved=saved["value"], saved_low=saved["low"],
            saved_high=saved["high"]))
        views.append({"name": name, "saved": round(saved["value"], 4),
                      "scores": scores.round(4).to_dict("records"),
                      "maps": [packed(attention_maps(model, torch.tensor([ids]))[:, 0])
                               for ids in shown.values()]})
    label = lambda i: tokenizer.decode([i], skip_special_tokens=False)
    data = {"title": title, "layers": shape[0], "heads": shape[1], "views": views,
            "protocol": PROTOCOL.format(rows=rows, length=length),
            "texts": [{"name": name[:60], "labels": ["start", *map(label, ids[1:])]}
                      for name, ids in shown.items()]}
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    written = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target.with_suffix(".csv"), pd.concat(tables).set_index(
        ["checkpoint", "layer", "head"]).round(5).to_csv())
    write_text(target, page.replace("DATA", written, 1))
    return target


def default_texts(folder: Path) -> list[str]:
    """What a page shows where no text is given: a name to remember and a sum."""
    from modern_llm.evaluation.attention import examples

    run = next((place for place in folder.parents[:3] if (place / "run.json").is_file()), None)
    data = read_record(run / "run.json")["config"]["data"] if run else {}
    built_in = tuple(data.get("sources", ())) == ("synthetic",)
    return [example.text for example in examples(built_in, data.get("world_seed", 0))[2:]]
