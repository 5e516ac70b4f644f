"""The first page of a report: what was trained on what, the five results beside their controls,
what worked and what did not, what it cost, and the command.

A plain module without torch; what is said of a result follows from the rules of `verdicts`.
"""

from __future__ import annotations

import math
import shlex

from modern_llm.config import ALWAYS, NOTEBOOKS, STAGES, ModelConfig, override, trained_on
from modern_llm.evaluation.families import TRAINED_ON
from modern_llm.models.counts import flops_per_token, parameter_count
from modern_llm.report.page import Page, Run, bullets, interval, markdown_table, model_name, number
from modern_llm.report.verdicts import (
    BETTER, FEW, SAME, WORSE, at_chance, dpo_control_results, five_results, known, losses_by_kind,
    one_model, other_losses, signed, verdict,
)

NOT_MEASURED = {
    "pretraining": ("pretraining: perplexity of held-out text", ("pretrain",)),
    "SFT": ("SFT: instructions or word problems, beside the pretrained model",
            ("pretrain", "sft", "eval")),
    "DPO": ("DPO: preferences, with and without", ("sft", "dpo", "eval")),
    "tax": ("perplexity tax of tuning", ("pretrain", "sft", "eval")),
    "verifier": ("verifier: choice among samples, beside votes without it", ("verifier", "eval"))}


def model_of(run: Run) -> ModelConfig | None:
    """The architecture in the run's settings."""
    values = run.record.get("config", {}).get("model")
    return override(ModelConfig(), values, "run.json: config.model") if values else None


def first_page(page: Page) -> None:
    """Everything a reader needs who reads no further."""
    run = page.run
    page.add(f"# Report of the run `{run.folder.name}`")
    trained(page)
    results = page.results = five_results(run)
    shown = [one for lines in results.values() for one in lines]
    if not shown and (shown := one_model(run)):
        results = {}
    results_table(page, results, shown)
    verdicts(page, shown)
    cost_and_command(page)


def trained(page: Page) -> None:
    """What was trained on what: a sentence, and one row a stage."""
    run, cfg = page.run, model_of(page.run)
    size = (f"{parameter_count(cfg)['total']:,} parameters, {cfg.num_layers} layers of width "
            f"{cfg.width}" if cfg else "a model of unknown size")
    page.add(f"Preset `{run.preset}`: {size}, seed {run.record.get('seed', 'unknown')}; "
             f"{len(run.results)} of {len(run.wanted)} stages finished.")
    page.origin(short=False)
    rows, absent, device = [], [], run.record.get("device", "cpu")
    gpu = device.startswith("cuda")
    unit = "GPU minutes" if gpu else "CPU minutes (threads × minutes)"
    threads = 1 if gpu else run.record.get("threads") or 1
    # of the stages that train
    ranks = run.record.get("config", {}).get("hardware", {}).get("ranks", 1)
    for stage in run.wanted:
        entry, found = run.stages.get(stage, {}), run.results.get(stage, {})
        status, tokens = entry.get("status", "not run"), found.get("tokens")
        minutes = entry["seconds"] / 60 if "seconds" in entry else None
        if stage not in run.results:
            absent.append(f"`{stage}` {'was not run' if status == 'not run' else f'is {status}'}: "
                          f"`{run.command(stage)}`")
        rows.append({"stage": stage, "status": status, "trained on": sources(run, stage),
                     "steps": found.get("steps"), "ended by": found.get("ended_by"),
                     "tokens": tokens, "epochs": found.get("epochs"),
                     "tokens/s": found.get("tokens_per_s"), "minutes": minutes,
                     unit: minutes and minutes * threads * (
                         ranks if found.get("train_seconds") else 1),
                     "training FLOPs": tokens * flops_per_token(cfg) if tokens and cfg else None})
    summed = ("tokens", "minutes", unit, "training FLOPs")
    rows.append({"stage": "all", **{name: sum(row[name] or 0 for row in rows) for name in summed}})
    for row in rows:
        row["training FLOPs"] = row["training FLOPs"] and f"{row['training FLOPs']:.2e}"
    page.add(markdown_table(rows), *absent)


def sources(run: Run, stage: str) -> str:
    """The data sets that a stage trained on, each with what it was read as."""
    try:
        named = trained_on(stage, run.record.get("config", {}))
    except (KeyError, TypeError):  # settings of before there was such a section
        return ""
    kinds: dict[str, list[str]] = {}
    for name, kind in named:
        kinds.setdefault(kind, []).append(name)
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items())


def results_table(page: Page, results: dict[str, list[dict]], shown: list[dict]) -> None:
    """Each result beside its controls, with the difference and what it says."""
    page.add("## Results beside their controls" if results else "## Results of the one model")
    rows = []
    for one in shown:
        other = interval(one["other"]) if one["other"] else ""
        change = signed(one["change"]) if one["change"] and known(one["change"]) else ""
        p = one["change"].get("p", math.nan) if change else math.nan
        change += f", p = {p:.2g}" * (p == p)
        rows.append({"result": one["what"], "value": interval(one["value"]),
                     "beside": one["beside"], "control": other,
                     "difference": " ".join(filter(None, [change, change and one["note"] and
                                                          f"({one['note']})"])),
                     "says": one["said"], "n": count(one["value"])})
    for name in (name for name, lines in results.items() if not lines):
        what, stages = NOT_MEASURED[name]
        absent = [f"`{stage}`" for stage in stages if stage not in page.run.results]
        rows.append({"result": what, "value": "not measured" + (
            f" ({', '.join(absent)} not run)" if absent else "")})
    columns = ["result", "value", "beside", "control", "difference", "says", "n"]
    page.add(markdown_table(rows, columns))
    notes = ["Brackets are 95% intervals over the items measured, differences are item by item "
             "where nothing else is said, p is McNemar's, *no difference shown* means that the "
             "interval contains 0 or the paired test does not reject it."]
    if results.get("verifier"):
        beside = [one["beside"] for one in results["verifier"]]
        if any(TRAINED_ON + "," in what for what in beside):
            notes.append("The generator trained on took the verifier's steps on its batches, and "
                         "learned no judging.")
        else:
            notes.append("The generator trained on the same further problems "
                         + ("is the verifier's own language model, which learned to judge besides."
                            if any("further problems" in what for what in beside)
                            else "was not recorded."))
    if results.get("DPO"):
        notes.append("The same training without preferences takes DPO's steps on its batches with "
                     "its other terms." if dpo_control_results(page.run) else
                     "A control that takes DPO's further steps without its preferences was not "
                     "recorded.")
    if len(page.seeds) < 2:
        notes.append("One seed: nothing here says what another training run would give.")
    else:
        notes.append(f"The range over {len(page.seeds)} seeds is under *Across seeds*.")
    page.add(" ".join(notes))


def count(row: dict) -> int | None:
    """The items of a row, as a whole number."""
    n = row.get("n")
    return int(n) if n is not None and n == n else None


def verdicts(page: Page, shown: list[dict]) -> None:
    """What worked, what did not, what shows no difference, and what is at chance: by rule."""
    run = page.run
    said = lambda wanted: grouped([one for one in shown if one["said"] == wanted])
    worked, lost = said(BETTER), said(WORSE)
    for row in other_losses(run, shown):
        lost.append(f"{model_name(row['stage'])}: {row['task']}, {row['metric']}, "
                    f"{signed({**row, 'value': row['change']})} against "
                    f"{model_name(row['against'])}")
    for one in losses_by_kind(run.ledger):
        lost.append(f"{model_name(one['stage'])}: {one['task']}, {one['metric']}: "
                    f"{interval(one['was'])} ({model_name(one['before'])}) → "
                    f"{interval(one['now'])}, {signed(one['change'])} not paired{whole(run, one)}")
    for stage, alarm in run.alarms:
        lost.append(f"{STAGES[stage].shown} raised an alarm: {alarm.get('alarm')} at step "
                    f"{number(alarm.get('step'))} ({alarm.get('detail')})")
    for stage, entry in run.stages.items():
        if stage in STAGES and entry.get("status") not in ("finished", "running"):
            lost.append(f"stage `{stage}` is {entry.get('status')}")
    chance = chance_lines(run)
    page.add("## What worked", bullets(worked) or "Nothing is shown to be better.",
             "## What did not", bullets(lost) or "No loss is shown.")
    for heading, lines in (("No difference shown", said(SAME)), ("Too few items", said(FEW))):
        if lines:
            page.add(f"**{heading}:** " + "; ".join(lines) + ".")
    if chance:
        page.add("**At chance:** " + "; ".join(chance) + ".")


def grouped(lines: list[dict]) -> list[str]:
    """Results in words, one sentence for each, with all its controls."""
    by_what: dict[str, list[str]] = {}
    for one in lines:
        by_what.setdefault(one["what"], []).append(
            f"{signed(one['change'])} against {one['beside']}")
    return [f"{what}: {', '.join(against)}" for what, against in by_what.items()]


def whole(run: Run, loss: dict) -> str:
    """What the paired test says of the measure over all kinds, where one kind is lost."""
    metric, gains = loss["metric"].rpartition(", ")[0], run.gains
    if gains.empty:
        return ""
    rows = gains[gains.stage.eq(loss["stage"]) & gains.task.eq(loss["task"])
                 & gains.against.eq(loss["before"]) & gains.metric.eq(metric)].to_dict("records")
    said = verdict({**rows[0], "value": rows[0]["change"]}) if rows else ""
    return f"; over all kinds: {said.strip('*')}" if said else ""


def chance_lines(run: Run) -> list[str]:
    """One line for every measure that some stage does not have above chance."""
    lines: dict[tuple, list[str]] = {}
    for one in at_chance(run.ledger):
        lines.setdefault((one["task"], one["metric"], one["name"]), []).append(
            f"{model_name(one['stage'])} {interval(one['row'])}" + " (below)" * one["below"])
    found = [f"{task}, {metric} (chance: {name}): {', '.join(rows)}"
             for (task, metric, name), rows in lines.items()]
    for row in run.results.get("verifier", {}).get("table", []):
        if row["metric"] == "within-problem AUC, verifier" and known(row) and row["low"] <= 0.5:
            found.append(f"{row['metric']} (chance: 0.5): {interval(row)}")
    return found


def cost_and_command(page: Page) -> None:
    """Minutes, tokens, device, and how to run it again."""
    run, record = page.run, page.run.record
    seconds = sum(entry.get("seconds") or 0 for entry in run.stages.values())
    tokens = sum(found.get("tokens") or 0 for found in run.results.values())
    started = [entry["started"] for entry in run.stages.values() if entry.get("started")]
    device = record.get("device", "unknown device")
    threads = f", threads: {record['threads']}" if record.get("threads") else ""
    page.add("## Cost and command",
             f"{seconds / 60:.1f} minutes in all, {tokens:,} training tokens, on {device} "
             f"({record.get('device_name', 'unknown')}{threads})"
             + (f", begun {min(started)}" if started else "")
             + ". FLOPs are the closed form of chapter 11, 3 × the forward pass per token.")
    commit = record.get("git_commit", "unknown")
    lines = [f"git checkout {commit.removesuffix('+changes')}"] if commit != "unknown" else []
    page.add("```bash\n" + "\n".join(lines + commands(run)) + "\n```")
    if commit.endswith("+changes"):
        page.add("The tree had changes that were not committed: the commit alone does not give "
                 "this run back.")


def commands(run: Run) -> list[str]:
    """The command of the whole run, if every stage was run alike; else those of its stages and of
    the report.
    """
    ran = [stage for stage in NOTEBOOKS if stage in run.params]
    alike = {shlex.join("all" if word == stage else word
                        for word in shlex.split(run.command(stage))) for stage in ran}
    if len(alike) == 1 and tuple(ran) == ALWAYS:
        return list(alike)
    report = (f"modern-llm run --preset {shlex.quote(run.preset)} --run {run.folder.name} "
              "--stage report")
    return [*(run.command(stage) for stage in ran), report]
