"""The model card of an export, from the files of the run that made the model; and the export with
its card.
"""

from __future__ import annotations

from pathlib import Path

from modern_llm.config import BUILT_IN, GENERATORS, STAGES, ModelConfig, trained_on
from modern_llm.data.sources import DatasetInfo, DatasetNotFound, dataset_info
from modern_llm.data.tokens import load_tokenizer
from modern_llm.files import read_json
from modern_llm.interchange.export import export_model
from modern_llm.messages import say
from modern_llm.models.counts import parameter_count
from modern_llm.report.evaluation import main_rows
from modern_llm.report.page import ReportError, Run, interval, markdown_table, number


def origin(checkpoint: Path) -> tuple[Run | None, list[str], str]:
    """The run that made a checkpoint, its stages up to there, and the third-party model that the
    first of them started from.
    """
    imported = (lambda folder: read_json(folder / "meta.json").get("imported", {}).get("source", "")
                               if (folder / "meta.json").is_file() else "")
    place = next((parent for parent in checkpoint.resolve().parents[:2] if parent.name in GENERATORS
                  and (parent.parent / "run.json").is_file()), None)
    if place is None:
        return None, [], imported(checkpoint)
    run, stages, stage = Run(place.parent), [], place.name
    try:
        while stage and stage not in stages:
            stages.insert(0, stage)
            settings = run.params.get(stage, {})
            if "config" not in settings:
                raise ReportError(
                    f"{run.folder / stage / 'params.json'} is absent or has no config")
            inputs = settings.get("inputs", {})
            stage = next((name for name in GENERATORS if name in inputs), None)
        run.record, run.results  # read, so that a damaged one is known here
    except ReportError as error:
        say(f"{error}: the model card says nothing about the run")
        return None, [], imported(checkpoint)
    given = inputs.get("checkpoint")
    return (run, stages, (imported(Path(given["path"])) or f"the checkpoint {given['sha256'][:12]}")
                         if given else "")


def info_of(name: str) -> DatasetInfo:
    """What the registry knows of a data set; the built-in ones are one entry, an own file that is
    gone has none.
    """
    try:
        return dataset_info("synthetic" if name in BUILT_IN else name)
    except DatasetNotFound:
        return DatasetInfo(name, "", "unknown", "text", ())


def data_rows(run: Run, stages: list[str]) -> list[dict]:
    """One row a data set: where it was used, where it comes from, its licence, and the fingerprint
    of what was read.
    """
    used: dict[str, list[str]] = {}
    for stage in stages:
        for name in dict.fromkeys(name for name, _ in trained_on(
                stage, run.params[stage]["config"])):
            used.setdefault(name, []).append(stage)
    read = {row["source"]: row.get("fingerprint", "") for stage in stages
            for row in run.results.get(stage, {}).get("data", []) if row.get("split") == "train"}
    return [{"data set": name, "used in": ", ".join(where),
             "from": (info := info_of(name)).hub or "built in" * (name in BUILT_IN),
             "licence": info.licence, "fingerprint": read.get(name, "")}
            for name, where in used.items()]


def result_table(run: Run, stage: str) -> str:
    """What was measured, with 95% intervals: from the evaluation's ledger, else from the stage's
    own results; "" if neither.
    """
    ledger = run.frame("eval/ledger.csv")
    found = [] if ledger.empty else main_rows(
        ledger[ledger.stage == STAGES[stage].called]).to_dict("records")
    own = [{"task": f"held out in the {stage} stage", **row}
           for row in run.results.get(stage, {}).get("table", [])]
    rows = [{"task": row["task"], "metric": row["metric"], "value [95% interval]": interval(row),
             "n": "" if row.get("n") != row.get("n") else row.get("n"),
             "protocol": row.get("protocol", "")} for row in found or own]
    return markdown_table(rows) if rows else ""


def limits(run: Run | None, stages: list[str], cfg: ModelConfig) -> list[str]:
    """What the files themselves say against the model."""
    found = [f"Texts longer than {cfg.context_length:,} tokens were not seen in "
             "training; rotary positions beyond that are untested.",
             "Nothing was done about, and nothing measured of, falsehoods, bias or harm: do not "
             "put it in front of people."]
    if run is None:
        return [*found, "It was not made by a run of this package, or the run's files are gone: "
                        "this card knows no results of it."]
    tokens = sum(run.results.get(stage, {}).get("tokens", 0) for stage in stages)
    found.insert(0,
                 f"{parameter_count(cfg)['total']:,} parameters and {tokens:,} tokens of training "
                 "here, one seed: the intervals are over items, not over training runs.")
    if any(row["data set"] in BUILT_IN for row in data_rows(run, stages)):
        found.append(
            "Data sets named synthetic are written by a program in a small world of their own: "
            "figures on them say what the method does, not how the model fares on human text.")
    overlap = run.frame("eval/contamination.csv")
    if len(overlap) and overlap.hit_share.max() > 0:
        worst = overlap.loc[overlap.hit_share.idxmax()]
        found.append(f"{100 * worst.hit_share:.1f}% of the items of {worst['set']} share a run of "
                     f"words with the training source {worst.source}.")
    for stage, alarm in run.alarms:
        if stage in stages:
            found.append(f"{STAGES[stage].shown} raised an alarm: {alarm.get('alarm')} at step "
                         f"{number(alarm.get('step'))} ({alarm.get('detail')}).")
    return found


def front_matter(datasets: list[str], base: str) -> str:
    """The block of YAML that the hub reads: no licence is claimed for the weights."""
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "license: other",
             "license_name: see-data-and-licences"]
    lines += ["datasets:", *(f"- {name}" for name in datasets)] if datasets else []
    lines += [f"base_model: {base}"] if "/" in base else []
    return "\n".join(["---", *lines, "---"])

USE = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
{ids}
print(tokenizer.decode(model.generate(**ids, max_new_tokens=60)[0]))"""
CHAT_IDS = """request = [{"role": "user", "content": "What is 3 plus 4?"}]
ids = tokenizer.apply_chat_template(request, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""
TEXT_IDS = """ids = tokenizer("<|endoftext|>One day", return_tensors="pt")"""


def model_card(checkpoint: Path, cfg: ModelConfig, architecture: str, dtype: str, size: int,
               name: str) -> str:
    """README.md of an export: what it is, how to use it, how it was made, from which data, what was
    measured, what to beware of.
    """
    from modern_llm.data.chat import is_chat_model

    run, stages, base = origin(checkpoint)
    count, rows, tokenizer = (parameter_count(cfg), data_rows(run, stages) if run else [],
                              load_tokenizer(checkpoint))
    chats = is_chat_model(checkpoint, tokenizer)  # a base model may have a template all the same
    closing = tokenizer.id_to_token(read_json(checkpoint / "config.json").get("eos_token_id") or 0)
    made = f"stage `{stages[-1]}` of the run `{run.folder.name}`" if run else "a checkpoint"
    active = (f", {count['active']:,} of them active for a token"
              if count["active"] != count["total"] else "")
    parts = [front_matter(list(dict.fromkeys(info.hub for row in rows
                                             if (info := info_of(row["data set"])).hub)), base),
             f"# {name}", f"{count['total']:,} parameters{active}, context {cfg.context_length:,}, "
                          f"vocabulary {cfg.vocab_size:,}; {made}, written by modern_llm in the "
                          f"layout of `{architecture}` ({dtype}, {size / 1e6:,.1f} MB).", "## Use",
             f"```python\n{USE.format(name=name, ids=CHAT_IDS if chats else TEXT_IDS)}\n```",
             f"It answers in its chat template and closes an answer with `{closing}`." if chats
             else "It continues text; documents begin and end with `<|endoftext|>`.",
             "## How it was made"]
    if base:
        parts.append(f"It started from {base}, a third-party model: that model's licence and "
                     "limits hold here too.")
    if run:
        parts.append(markdown_table(
            [{"stage": stage, "steps": (found := run.results.get(stage, {})).get("steps"),
              "tokens": found.get("tokens"),
              "minutes": run.stages.get(stage, {}).get("seconds", 0) / 60,
              "ended by": found.get("ended_by")} for stage in stages]))
        changed = [
            f"* From step {change['from_step']} of {stage} on: {', '.join(change['settings'])}."
            for stage in stages for change in run.params.get(stage, {}).get("changed_under_way", [])
        ]
        parts += ["\n".join(["Settings were changed under way:", "", *changed])] if changed else []
        parts.append("```bash\n" + "\n".join(run.command(stage) for stage in stages) + "\n```")
        versions = ", ".join(f"{package} {version}"
                             for package, version in run.record.get("versions", {}).items())
        parts.append(f"Commit `{run.record.get('git_commit', 'unknown')}`, seed "
                     f"{run.record.get('seed', 'unknown')}, "
                     f"{run.record.get('device_name', 'unknown device')}; {versions}.")
    parts += ["## Data and licences", markdown_table(rows) if rows else "Not known to this card."]
    if rows:
        parts.append("These are the licences of the data. Whether and how they bind the weights is "
                     "for you to judge.")
    parts += ["## Results", (result_table(run, stages[-1]) if run else "") or "None were measured."]
    parts += ["## Limits", "\n".join(f"* {limit}" for limit in limits(run, stages, cfg))]
    return "\n\n".join(parts) + "\n"


def export_with_card(checkpoint: str | Path, folder: str | Path, **options) -> Path:
    """`export_model` with a model card in README.md; the options are those of it."""
    return export_model(checkpoint, folder, card=model_card, **options)
