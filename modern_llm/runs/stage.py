"""What every stage notebook does before its own work: `begin` makes a `StageRun` of its parameters,
`config_table` shows what it will do, `train_stage` trains it.

Plain plumbing shared by chapters 03–08, so that a stage's first cells stay three lines long. torch
is imported where it is needed, not at the top.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from modern_llm.config import (
    GPT2_VOCAB_SIZE, STAGES, PipelineConfig, TrainConfig, override, to_dict,
)
from modern_llm.files import read_json
from modern_llm.interchange.hub import find_checkpoint, is_model
from modern_llm.messages import StageError, say
from modern_llm.models import counts
from modern_llm.runs.bases import make_bases
from modern_llm.runs.data_files import changed_data, check_splits, data_files
from modern_llm.runs.kernel import keep_notebook, mark_failures
from modern_llm.runs.launch import collect_again
from modern_llm.runs.lineage import described, found_inputs, no_inputs, own_inputs, start_of
from modern_llm.runs.locks import RunLock
from modern_llm.runs.parameters import choose_folder, injected_parameters, refuse_unknown, resolve
from modern_llm.runs.preflight import GIB, check_tracker, memory_needed, preflight, settings_of
from modern_llm.runs.record import StageRun, write_record, writes_to
from modern_llm.runs.resume import (
    archive_results, changed_settings, history, params_of, resume_blocker, run_record,
)
from modern_llm.runs.spec import changes, recipe_of, setting
from modern_llm.training.ranks import rank_info
from modern_llm.training.tracking import how_to_look

if TYPE_CHECKING:
    from modern_llm.training.recipe import Recipe
    from modern_llm.training.trainer import TrainResult


def begin(stage: str, namespace: dict, declared: list[str]) -> StageRun:
    """Start a stage from a notebook: `begin("pretrain", globals(), [names of the parameters])`.

    Resolves the preset, refuses unknown parameters, takes the run's lock, finds the checkpoints to
    start from, checks the machine and the data, makes `runs/<run>/<stage>/`, and writes
    `params.json` and `run.json`. Nothing is written when a check fails. From then until `finish`,
    SIGTERM and SIGUSR1 end the stage: with a checkpoint while it trains, at once where it does not.
    """
    collect_again()
    refuse_unknown(injected_parameters(namespace.get("In", [])), declared)
    parameters = {name: namespace[name] for name in declared}
    config = resolve(stage, parameters)
    name, folder, _ = choose_folder(stage, parameters, config)
    lock = None
    try:
        if os.environ.get("RANK", "0") == "0":  # the other ranks of a job write nothing
            with writes_to(folder, "or choose another place with output_dir=…"):
                lock = RunLock(folder.parent, f"stage {stage}").take()
        # again: another process may just have finished it
        _, _, resume = choose_folder(stage, {**parameters, "run": name}, config)
        stage_run = _begin(stage, name, folder, resume, parameters, config, lock)
    except BaseException:
        if lock:
            lock.release()
        raise
    mark_failures(stage_run, namespace)
    keep_notebook(folder / "notebook.ipynb", namespace)
    return stage_run


def _begin(stage: str, name: str, folder: Path, resume: bool, parameters: dict,
           resolved: PipelineConfig, lock: RunLock | None) -> StageRun:
    """The checks of `begin`, and the stage's record, once nobody else works on the run."""
    check_tracker(resolved, stage)
    config, former = resolved, params_of(folder) if resume else {}
    changed = changed_settings(former, stage, config) if resume else []
    if against := resume_blocker(folder, config, changed):
        raise StageError(
            f"stage {stage} {'is finished' if (folder / 'results.json').exists() else 'was begun'} "
            f"in {folder} and cannot go on with other settings:\n  - " + "\n  - ".join(changed)
            + f"\n{against[0].upper()}{against[1:]}. Ask for the former settings, or "
              "say force=True to delete the stage and start over, or choose another run name")
    if resume and not parameters.get("resume"):
        say(f"{stage}: was preempted, goes on")
    inputs = choose_inputs(stage, config, parameters, folder, former)
    if start := start_of(inputs):
        config = with_model_of(config, start)
    # another micro-batch or precision would round differently
    if resume and isinstance(settings_of(config, stage), TrainConfig):
        config = override(config, {stage: fitted_before(folder, stage, config)})
    config, device = preflight(config, stage)
    set_precision(config, device)
    for line in check_splits(config, stage)[0]:
        say(f"{stage}: {line}")
    if config.tracker and isinstance(settings_of(config, stage), TrainConfig):
        say(f"{stage}: its curves: {how_to_look(config.tracker, folder.parent)}")
    if other := changed_data(config, stage, former.get("data_files", {})):
        raise StageError(f"stage {stage} was begun with other data: {'; '.join(other)}. Put the "
                         "former file back, or say force=True to "
                         "delete the stage and start over, or choose another run name")
    stage_run = StageRun(stage, name, config, device, folder, resume, time.time(), inputs,
                         lock=lock)
    stage_run.world = rank_zero_world(stage_run, parameters)
    record_so_far = run_record(folder.parent)
    data, under_way = (data_files(config, stage, former.get("data_files")),
                       history(folder, former, changed))
    with writes_to(folder, "or choose another place with output_dir=…"):
        if parameters.get("force") and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # it trains on: what was found out about the model as it was is no result of the one to come
        if changed:
            archive_results(folder)
        write_record(stage_run, parameters, resolved, record_so_far, data, under_way)
    return stage_run


def train_stage(run: StageRun, recipe: Recipe | None = None) -> TrainResult:
    """Train a stage: what its notebook calls, and every other rank too.

    Args:
        recipe: what it trains with, where the page has prepared and shown it.

    Raises:
        StageError: training was stopped before its end; it says how to go on.
        TrainingEnded: on the other ranks, whatever ended it.
    """
    recipe = recipe or recipe_of(run.stage)(run)
    result = recipe.fit()
    run.require(result.stopped)
    return result


# ---- the ranks -----------------------------------------------------------------------------------


def rank_zero_world(run: StageRun, parameters: dict):
    """The ranks that will train with this process (hardware.ranks), and what they have to run for
    it; None if nothing is trained.

    StageError if they were not started.
    """
    if not isinstance(settings_of(run.config, run.stage), TrainConfig):
        return None
    from modern_llm.training.distributed import World

    hardware, (_, size, _) = run.config.hardware, rank_info()
    if hardware.ranks > 1 and size != hardware.ranks:
        raise StageError(f"hardware.ranks={hardware.ranks}, but {size} "
                         f"process{'es were' if size > 1 else ' was'} started: run "
                         f"`modern-llm run --stage {run.stage} -p hardware.ranks={hardware.ranks} "
                         f"…`, or set hardware.ranks={size}")
    task = {"stage": run.stage, "run": run.run, "folder": str(run.folder), "resume": run.resume,
            "parameters": parameters}
    return World(0, hardware.ranks, hardware.strategy, task, hardware.sharded_checkpoints)


def begin_on_worker(task: dict) -> StageRun:
    """The stage as rank 0 began it and says in the `task`, for another rank; nothing is written."""
    from modern_llm.training.distributed import World
    from modern_llm.training.training_state import pick_device

    stage, folder = task["stage"], Path(task["folder"])
    config = resolve(stage, task["parameters"])
    inputs = {name: Path(entry["path"])
              for name, entry in read_json(folder / "params.json")["inputs"].items()}
    if start := start_of(inputs):
        config = with_model_of(config, start)
    config = override(config, {stage: fitted_before(folder, stage, config)})
    hardware = config.hardware
    set_precision(config, str(pick_device(hardware.device)))
    world = World(rank_info()[0], hardware.ranks, hardware.strategy,
                  sharded_checkpoints=hardware.sharded_checkpoints)
    return StageRun(stage, task["run"], config, str(pick_device(config.hardware.device)), folder,
                    task["resume"], time.time(), inputs, world)


def set_precision(config: PipelineConfig, device: str) -> None:
    """`hardware.inference_precision`, for this process: the same on every rank of a stage."""
    import torch

    from modern_llm.training.training_state import set_inference_precision

    set_inference_precision(config.hardware.inference_precision, torch.device(device))


def fitted_before(folder: Path, stage: str, config: PipelineConfig) -> dict:
    """What an earlier session of the stage made of the settings that follow the machine: its
    micro-batch, and its precision where `config` leaves that open.
    """
    record = (read_json(folder / "params.json").get("config")
              or read_json(folder.parent / "run.json")["config"])[stage]
    left_open = settings_of(config, stage).precision == "auto"
    return {name: record[name]
            for name in ("micro_batch_size", *(["precision"] if left_open else []))}


# ---- what it starts from -------------------------------------------------------------------------


def choose_inputs(stage: str, config: PipelineConfig, parameters: dict, folder: Path,
                  former: dict) -> dict[str, Path]:
    """The checkpoints a stage starts from; a line says which. `former` is its `params.json` when it
    is resumed.
    """
    if STAGES[stage].first:
        return {}
    run_folder = folder.parent
    # run_folder may carry a time
    named = run_folder.parent / str(parameters.get("run") or config.name)
    if parameters.get("checkpoint"):
        inputs = {"checkpoint": find_checkpoint(parameters["checkpoint"])}
    elif not (inputs := own_inputs(stage, run_folder) or own_inputs(stage, named)
                        or found_inputs(stage, run_folder, config)):
        if config.name != "lesson":
            raise no_inputs(stage, run_folder, config.name)
        inputs = {name: Path(entry["path"]) for name, entry in former.get("inputs", {}).items()}
        if not inputs or not all(map(is_model, inputs.values())):
            _, device = preflight(config, stage)
            inputs = make_bases(stage, config, parameters, device)
    now = described(inputs)
    if changed := changes(*({n: e["sha256"][:12] for n, e in side.items()}
                            for side in (former.get("inputs", now), now))):
        raise StageError(f"stage {stage} was begun from other weights ({'; '.join(changed)}): say "
                         "force=True to delete it and start over, or choose another run name")
    say(f"{stage}: starts from {start_of(inputs)}"
        + (f"; uses {', '.join(inputs)}" if len(inputs) > 1 else ""))
    return inputs


def with_model_of(config: PipelineConfig, checkpoint: Path) -> PipelineConfig:
    """The config with the architecture of a checkpoint in place of the preset's, but rows no longer
    than the preset's; a line says what differs.
    """
    from modern_llm.models.saving import read_config

    own = read_config(checkpoint)
    model = dataclasses.replace(own,
                                context_length=min(own.context_length, config.model.context_length))
    if model != own:
        say(f"  rows of {model.context_length} tokens, as the preset says; the model itself keeps "
            f"its context of {own.context_length}")
    if differing := changes(to_dict(config.model), to_dict(model), "model."):
        say("  the model is the checkpoint's, not the preset's: " + "; ".join(differing))
    # later stages read the checkpoint's tokenizer, not these two settings; they must only fit each
    # other
    data = config.data
    if data.tokenizer == "bpe" or model.vocab_size < GPT2_VOCAB_SIZE:
        data = dataclasses.replace(
            data, tokenizer="bpe",
            tokenizer_vocab_size=min(data.tokenizer_vocab_size, model.vocab_size))
    return dataclasses.replace(config, model=model, data=data)


# ---- what it will do -----------------------------------------------------------------------------


def config_table(config: PipelineConfig, stage: str):
    """What the stage will do, as a table: the model, the data it reads, its optimisation, and its
    own settings.
    """
    import pandas as pd

    model, settings = config.model, settings_of(config, stage)
    parameters = counts.parameter_count(model)
    data = {name: None for path in STAGES[stage].data for value in [setting(config, path)]
            for name in ([value] if isinstance(value, str) else value) if name != "text"}
    rows = [
        ("preset", config.name, config.description),
        ("parameters", f"{parameters['total']:,}", f"{parameters['active']:,} active for a token"),
        ("shape", f"{model.num_layers} layers × {model.width}",
         f"{model.num_heads} heads, {model.num_kv_heads} key/value "
         f"groups, feed-forward {model.ffn_width}, context {model.context_length}"),
    ]
    if STAGES[stage].first:
        rows.append(("data", ", ".join(data),
                     f"tokenizer {config.data.tokenizer}, vocabulary {model.vocab_size}"))
    elif data:
        rows.append(("data", ", ".join(data), ""))
    if isinstance(settings, TrainConfig):
        rows += _optimisation(config, stage, settings)
    rows.append(("memory", f"{memory_needed(config, stage) / GIB:.2f} GB",
                 "estimated, to train" if isinstance(settings, TrainConfig)
                 else "estimated, to run the model"))
    if settings is not None:
        shared = ({field.name for field in dataclasses.fields(TrainConfig)}
                  | {path.split(".")[1] for path in STAGES[stage].data})
        own = {field.name: getattr(settings, field.name)
               for field in dataclasses.fields(settings) if field.name not in shared}
        rows += [(name.replace("_", " "),
                  ", ".join(map(str, value)) if isinstance(value, tuple) else str(value), "")
                 for name, value in own.items()]
    return pd.DataFrame(rows, columns=["", "value", "detail"]).set_index("")


def _optimisation(config: PipelineConfig, stage: str,
                  train: TrainConfig) -> list[tuple[str, str, str]]:
    """Batch, budget and optimizer; only in pretraining is every row as long as the context."""
    limit = f"at most {train.max_minutes:g} minutes" if train.max_minutes else ""
    batch, budget, detail = f"{train.batch_size} rows", f"{train.max_steps:,} steps", limit
    if STAGES[stage].first:
        tokens = train.max_steps * train.batch_size * config.model.context_length
        batch = f"{train.batch_size} × {config.model.context_length} tokens"
        budget += f" = {tokens / 1e6:,.1f}M tokens"
        detail = (f"{tokens * counts.flops_per_token(config.model):.1e} FLOPs"
                  + (f", {limit}" if limit else ""))
    return [
        ("batch", batch, f"in micro-batches of {train.micro_batch}" + (
            f", shared by {config.hardware.ranks} ranks ({config.hardware.strategy})"
            if config.hardware.ranks > 1 else "")),
        ("budget", budget, detail),
        ("optimizer", train.optimizer,
         f"lr {train.lr:g}" + (f", Muon {train.muon_lr:g}" if train.optimizer == "muon" else "")
         + f", weight decay {train.weight_decay:g}, {train.schedule}"),
    ]
