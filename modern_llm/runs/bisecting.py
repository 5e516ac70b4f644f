"""The first step and tensor in which two runs of one stage differ: what they were told, what they
logged, what they kept. Imports no torch before it reads weights.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from modern_llm.config import GENERATORS, TRAINED
from modern_llm.files import DamagedFolder, read_record, sha256
from modern_llm.messages import StageError
from modern_llm.report.comparing import flat
from modern_llm.runs.resume import LATER, params_of, run_record

# columns that say how fast a machine was, and never agree
SPEEDS = ("tokens_per_s", "data_wait_s", "peak_memory_gb", "mfu")
# settings that change in which order and format is summed, but not what
ROUNDING = ("micro_batch_size", "precision", "compile", "gradient_checkpointing",
            "loss_chunk_tokens")
SMALL = 1e-4  # a relative difference up to this is called rounding
# of a layer, in the order of the forward pass
PARTS = ("input_layernorm", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "sinks", "o_proj",
         "post_attention_layernorm", "mlp.gate.", "moe.gate.", "gate_proj", "w1", "up_proj", "w3",
         "down_proj", "w2")


@dataclass(frozen=True)
class Side:
    """What one of the runs left of the stage."""

    name: str
    folder: Path  # of the stage
    told: dict[str, dict]  # "settings", "start", "data", "machine": names -> values
    rows: dict[int, dict]  # of metrics.jsonl, by step
    kept: dict[int, Path]  # checkpoints, by step


def common_stage(one: Path, other: Path, wanted: str | None = None) -> str:
    """The last stage of which both runs have metrics, or the `wanted` one. StageError if they have
    not.
    """
    have = [[name for name in TRAINED if (run / name / "metrics.jsonl").is_file()]
            for run in (one, other)]
    both = [name for name in have[0] if name in have[1]]
    if wanted in both or wanted is None and both:
        return wanted or both[-1]
    said = "; ".join(f"{run.name} has {', '.join(names) or 'none'}"
                     for run, names in zip((one, other), have))
    raise StageError(f"{one.name} and {other.name} have no metrics of "
                     f"{wanted or 'a stage'} in common: {said}. Run it in both, or choose another "
                     "--stage")


def side(run: Path, stage: str) -> Side:
    """What a run left of a stage. StageError or DamagedFolder for what cannot be read."""
    folder = run / stage
    params, record = params_of(folder), run_record(run)
    settings = flat(params["config"])
    settings |= {name: value for name, value in LATER.items() if name not in settings
                 and any(known.startswith(name.partition(".")[0] + ".") for known in settings)}
    facts = {name: record.get(name) for name in ("git_commit", "device", "device_name", "threads",
                                                 "platform")}
    told = {"settings": settings,
            # a checkpoint given by hand may be that of a stage of another run
            "start": {"weights": next((params["inputs"][name]["sha256"]
                                       for name in ("checkpoint", *GENERATORS)
                                       if name in params["inputs"]), None)},
            "data": {name: entry["sha256"] for name, entry in params["data_files"].items()},
            "machine": facts | flat(record.get("versions") or {})}
    return Side(run.name, folder, told, metrics_of(folder / "metrics.jsonl"),
                kept_checkpoints(folder))


def metrics_of(path: Path) -> dict[int, dict]:
    """The rows of a metrics file by their step; a last line torn by a kill is left out."""
    rows, lines = {}, path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            rows[int(row["step"])] = row
        except (ValueError, KeyError, TypeError):
            raise DamagedFolder(f"{path}, line {number}, is no row with a step: put a whole copy "
                                "there, or run the stage again") from None
    return rows


def kept_checkpoints(folder: Path) -> dict[int, Path]:
    """The folders of the weights that a stage kept, by their step."""
    places = [*sorted((folder / "checkpoints").glob("step-*")), folder / "checkpoint.previous",
              folder / "checkpoint"]
    return dict(sorted((read_record(place / "meta.json").get("step", 0), place)
                       for place in places if (place / "meta.json").is_file()
                       and any(place.glob("*.safetensors"))))


# ---- differences ---------------------------------------------------------------------------------


def differing(one: dict, other: dict) -> dict[str, tuple]:
    """What differs between two dictionaries: name -> (one's, the other's value)."""
    return {name: (one.get(name), other.get(name)) for name in {**one, **other}
            if one.get(name) != other.get(name)}


def relative(one: object, other: object) -> float:
    """|a − b| / max(|a|, |b|); infinite if not both are finite numbers."""
    numbers = [value for value in (one, other)
               if isinstance(value, (int, float)) and math.isfinite(value)]
    if len(numbers) < 2:
        return math.inf
    return abs(one - other) / max(abs(one), abs(other)) if one != other else 0.0


def compare_rows(one: dict[int, dict], other: dict[int, dict]) -> dict:
    """The first step that both logged and whose columns differ: `step` (None if none does),
    `columns` (values and relative difference of each that differs), how many steps before it are
    `equal`, to which (`until`), and of how many (`steps`).

    Columns that only one has, and those of speed, are left out.
    """
    steps = sorted(one.keys() & other.keys())
    for place, step in enumerate(steps):
        a, b = one[step], other[step]
        columns = [{"column": name, "a": a[name], "b": b[name],
                    "relative": relative(a[name], b[name])}
                   for name in a if name in b and name not in SPEEDS and a[name] != b[name]]
        if columns:
            return {"step": step, "columns": columns, "equal": place, "steps": len(steps),
                    "until": steps[place - 1] if place else None}
    return {"step": None, "columns": [], "equal": len(steps), "steps": len(steps),
            "until": steps[-1] if steps else None}


def model_order(name: str) -> tuple:
    """Where a tensor stands in the forward pass: the embedding, the layers, what is behind them."""
    if layer := re.search(r"\.(\d+)\.", name):
        return (1, int(layer[1]), next((place for place, part in enumerate(PARTS) if part in name),
                                       len(PARTS)), name)
    return (0 if "embed" in name else 2 if "norm" in name else 3, 0, 0, name)


def compare_tensors(one: Path, other: Path) -> list[dict]:
    """The tensors in which two checkpoints differ, in the order of the model: `tensor`, `relative`,
    max |a − b| / max(|a|, |b|) over the tensor, and `note`, where they cannot be subtracted.

    DamagedFolder names a file that cannot be read.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    def tensors(folder: Path) -> dict[str, torch.Tensor]:
        found = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                found |= load_file(path)
            except (SafetensorError, OSError) as error:
                raise DamagedFolder(f"{path} is truncated or damaged ({error}): copy it again, or "
                                    "take that checkpoint away") from error
        return found

    a, b, rows = tensors(one), tensors(other), []
    for name in sorted({**a, **b}, key=model_order):
        x, y, most, note = a.get(name), b.get(name), math.inf, ""
        if x is None or y is None:
            note = f"only in {one if y is None else other}"
        elif (x.shape, x.dtype) != (y.shape, y.dtype):
            note = f"{tuple(x.shape)} {x.dtype}, {tuple(y.shape)} {y.dtype}".replace("torch.", "")
        elif torch.equal(x, y):
            continue
        else:
            x, y = x.float(), y.float()
            apart = ((x - y).abs().max() / torch.maximum(x.abs().max(), y.abs().max())).item()
            most = apart if math.isfinite(apart) else math.inf
        rows.append({"tensor": name, "relative": most, "note": note})
    return rows


def compare_kept(one: Side, other: Side) -> dict:
    """The first checkpoint that both kept and whose tensors differ: `step` (None if none does),
    `tensors`, the `equal` steps before, all common `steps`, and files that were `changed` since
    they were written.
    """
    steps = sorted(one.kept.keys() & other.kept.keys())
    for place, step in enumerate(steps):
        folders = one.kept[step], other.kept[step]
        if tensors := compare_tensors(*folders):
            return {"step": step, "tensors": tensors, "equal": steps[:place], "steps": steps,
                    "changed": [str(path) for folder in folders for path in changed_since(folder)]}
    return {"step": None, "tensors": [], "equal": steps, "steps": steps, "changed": []}


def changed_since(folder: Path) -> list[Path]:
    """The weights of a checkpoint whose sha256 is not the one in its meta.json."""
    sums = read_record(folder / "meta.json").get("sha256") or {}
    return [path for path in sorted(folder.glob("*.safetensors"))
            if path.name in sums and sha256(path) != sums[path.name]]


# ---- in words ------------------------------------------------------------------------------------


def bisect(one: Path, other: Path, stage: str | None = None) -> dict:
    """Where two runs part: `stage`, `told` (what differs of settings, start, data and machine),
    `metrics` (see `compare_rows`), `checkpoints` (see `compare_kept`), `same` and the `verdict`.

    Args:
        one, other: folders of the runs.
        stage: of both; None for the last that both have.

    Raises:
        StageError: no stage, or no step of it, in common.
        DamagedFolder: a file that cannot be read.
    """
    stage = common_stage(one, other, stage)
    a, b = side(one, stage), side(other, stage)
    if not a.rows.keys() & b.rows.keys():
        said = "; ".join(f"{each.name}: {', '.join(map(str, list(each.rows)[:5])) or 'none'} …"
                         for each in (a, b))
        raise StageError(f"{stage} of {a.name} and {b.name} logged no step in common ({said}): "
                         f"choose another --stage, or run both with one {stage}.log_every")
    told = {part: differing(a.told[part], b.told[part]) for part in a.told}
    metrics, kept = compare_rows(a.rows, b.rows), compare_kept(a, b)
    return {"stage": stage, "a": a.name, "b": b.name, "told": told, "metrics": metrics,
            "checkpoints": kept, "same": metrics["step"] is None and kept["step"] is None,
            "verdict": verdict(told, metrics, kept)}


def verdict(told: dict[str, dict], metrics: dict, kept: dict) -> str:
    """What was found, in words: for how long the runs are equal, and what parts them."""
    equal = f"equal to the last bit for {metrics['equal']} logged steps, to step {metrics['until']}"
    if metrics["step"] is None and kept["step"] is None:
        return f"nothing differs: {equal}" + (
            f", and in the checkpoints of {_steps(kept['steps'])}" if kept["steps"]
            else "; there is no checkpoint of one step in both")
    if kept["changed"]:
        return (f"{kept['changed'][0]} was changed after it was written: its sha256 is not the one "
                "in meta.json")
    if metrics["step"] is None:
        return (f"the metrics are {equal}, and the weights of step {kept['step']} differ: "
                + cause(told, max(row["relative"] for row in kept["tensors"])))
    most = max(row["relative"] for row in metrics["columns"])
    begin = (f"{equal}; they differ at step {metrics['step']}" if metrics["equal"]
             else f"they differ from the first logged step on, step {metrics['step']}")
    return f"{begin}: {cause(told, most)}"


def cause(told: dict[str, dict], most: float) -> str:
    """What a difference comes from, as far as the records tell; `most` is the largest relative one.
    """
    settings = told["settings"]
    orders = [name for name in settings if name.rpartition(".")[2] in ROUNDING]
    others = [name for name in settings if name not in orders]
    if "seed" in others:
        return f"another seed ({settings['seed'][0]} and {settings['seed'][1]})" + (
            f", and other settings: {_names(others, 'seed')}" if len(others) > 1 else "")
    if others:
        return f"other settings: {_names(others)}"
    if told["start"]:
        return "they start from other weights"
    if told["data"]:
        return f"they read other data: {_names(told['data'])}"
    recorded = [*orders, *told["machine"]]
    if most <= SMALL:
        return (f"rounding: a relative {most:.0e}, as another machine or number of threads gives; "
                + (f"their records differ in {_names(recorded)}" if recorded
                   else "nothing that is recorded differs"))
    size = "" if most == math.inf else f" ({most:.0e}, relative)"
    return (f"more than rounding{size}, from the same settings and data; their records differ in "
            f"{_names(recorded)}" if recorded
            else f"more than rounding{size}, and nothing that is recorded differs")


def _names(names, without: str = "") -> str:
    """Up to six names."""
    names = [name for name in names if name != without]
    return ", ".join(names[:6]) + f" and {len(names) - 6} more" * (len(names) > 6)


def _steps(steps: list[int]) -> str:
    return f"step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))}"
