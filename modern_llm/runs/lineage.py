"""What a stage starts from: earlier checkpoints of its run, or a model given by hand. Imports no
torch.
"""

from __future__ import annotations

from pathlib import Path

from modern_llm.config import GENERATORS, STAGES, PipelineConfig
from modern_llm.files import find_folder, read_record
from modern_llm.interchange import hub
from modern_llm.interchange.hub import find_checkpoint, is_model, weights_digest
from modern_llm.messages import StageError


def own_checkpoint(run_folder: Path, stage: str) -> Path | None:
    """The checkpoint of a finished stage of a run."""
    if not (run_folder / stage / "results.json").is_file():
        return None
    try:
        return find_folder(run_folder / stage / "checkpoint")
    except FileNotFoundError:
        return None


def own_inputs(stage: str, run_folder: Path) -> dict[str, Path]:
    """The checkpoints of earlier stages of the same run that the stage starts from or judges; empty
    if there are none.
    """
    spec = STAGES[stage]
    there = {name: folder for name in spec.starts_from or spec.judges
             if (folder := own_checkpoint(run_folder, name))}
    if spec.starts_from:
        return dict(list(there.items())[:1])
    # a run that began at SFT: its base is what it was given
    if "sft" in there and "pretrain" not in there:
        made_from = read_record(run_folder / "sft" / "params.json").get("inputs", {})
        given = made_from.get("checkpoint") or made_from.get("pretrain")
        if given and is_model(Path(given["path"])):
            there = {"pretrain": Path(given["path"]), **there}
    return there if there.keys() & set(GENERATORS) else {}


def found_inputs(stage: str, run_folder: Path, config: PipelineConfig) -> dict[str, Path]:
    """`own_inputs`, or the third-party model that the preset starts from. StageError says how to
    get that.
    """
    own = own_inputs(stage, run_folder)
    if own or STAGES[stage].first or not config.start_from:
        return own
    try:
        return {"checkpoint": find_checkpoint(hub.find_model(config.start_from))}
    except FileNotFoundError as error:
        raise StageError(f"preset {config.name!r} starts from a model instead of pretraining, and "
                         f"it is not here: {error}; or name a folder with --checkpoint PATH (in a "
                         "notebook, checkpoint = \"PATH\")") from error


def start_of(inputs: dict[str, Path]) -> Path | None:
    """The checkpoint to start from: the one given by hand, else of the last stage that made a
    language model.
    """
    return next((inputs[name] for name in ("checkpoint", *GENERATORS) if name in inputs), None)


def described(inputs: dict[str, Path]) -> dict[str, dict[str, str]]:
    """Path and digest of every input, as they go into `params.json`."""
    return {name: {"path": str(folder), "sha256": weights_digest(folder)}
            for name, folder in inputs.items()}


def no_inputs(stage: str, run_folder: Path, preset: str) -> StageError:
    """The error of a stage that has nothing to start from."""
    spec = STAGES[stage]
    return StageError(
        f"stage {stage} starts from an earlier checkpoint, and {run_folder} has none: no finished "
        f"stage {' or '.join(spec.starts_from or GENERATORS)}. Run `modern-llm run --preset "
        f"{preset} --run {run_folder.name} --stage {spec.base[-1]}` first, or `--stage all`, or "
        "give a checkpoint: --checkpoint PATH (in a notebook, checkpoint = \"PATH\").")
