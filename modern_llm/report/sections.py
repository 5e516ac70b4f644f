"""The sections of a report that are no measurement of the evaluation, and all of them in order. One
whose stage has not run says so, with the command that fills it. No torch.
"""

from __future__ import annotations

import hashlib
import shlex
import shutil

from modern_llm.config import NOTEBOOKS, STAGES, ModelConfig, override
from modern_llm.evaluation.families import is_aside
from modern_llm.models.counts import flops_per_token, parameter_count
from modern_llm.report.evaluation import (
    baselines, contamination, perplexities, results, sentiment, stage_gains, verifier,
)
from modern_llm.report.page import (
    Page, Run, folded, interval, markdown_table, measures, number, text_block,
)
from modern_llm.report.seeds import summarise_seeds


def model_of(run: Run) -> ModelConfig | None:
    """The architecture in the run's settings."""
    values = run.record.get("config", {}).get("model")
    return override(ModelConfig(), values, "run.json: config.model") if values else None


def headline(run: Run, stage: str) -> str:
    """The stage's most telling figure."""
    rows = run.results.get(stage, {}).get("table", [])
    if found := STAGES[stage].telling(rows):
        return f"{found[0]['metric']}: {interval(found[0])}"
    if STAGES[stage].headline or stage not in run.results:
        return ""
    return f"{len(run.frame(f'{stage}/ledger.csv')) or len(rows)} measures"


def summary(page: Page) -> None:
    run, record = page.run, page.run.record
    started = [entry["started"] for entry in run.stages.values() if entry.get("started")]
    seconds = sum(entry.get("seconds", 0) for entry in run.stages.values())
    cfg = model_of(run)
    size = f"{parameter_count(cfg)['total']:,} parameters" if cfg else "unknown size"
    page.add(f"# Report of the run `{run.folder.name}`",
             f"Preset `{run.preset}`, {size}, seed {record.get('seed', 'unknown')}; "
             f"{len(run.results)} of {len(NOTEBOOKS)} stages finished, {seconds / 60:.1f} minutes "
             f"in all{f', begun {min(started)}' if started else ''}.")
    page.origin(short=False)


def pipeline(page: Page) -> None:
    page.add("## Pipeline")
    rows = []
    for stage in NOTEBOOKS:
        entry, results = page.run.stages.get(stage, {}), page.run.results.get(stage, {})
        rows.append({"stage": stage, "status": entry.get("status", "not run"),
                     "steps": results.get("steps"), "tokens": results.get("tokens"),
                     "minutes": entry["seconds"] / 60 if "seconds" in entry else None,
                     "ended by": results.get("ended_by"), "headline": headline(page.run, stage)})
    page.add(markdown_table(rows))
    for stage in NOTEBOOKS:
        status = page.run.stages.get(stage, {}).get("status")
        if stage not in page.run.results:
            page.add(f"`{stage}` {'was not run' if not status else f'is {status}'}: "
                     f"`{page.run.command(stage)}`")


def architecture(page: Page) -> None:
    from modern_llm.report import pictures

    page.add("## Architecture")
    cfg = model_of(page.run)
    if cfg is None:
        page.add("`run.json` holds no settings of a model.")
        return
    counts = parameter_count(cfg)
    kind = (f"mixture of {cfg.num_experts} experts, {cfg.experts_per_token} a token"
            if cfg.num_experts else "SwiGLU")
    page.add(markdown_table([{"": name, "value": value} for name, value in {
        "kind": "decoder-only transformer, RMSNorm before each branch, rotary positions",
        "layers × width": f"{cfg.num_layers} × {cfg.width}",
        "attention": f"{cfg.num_heads} heads of {cfg.head_width} channels, {cfg.num_kv_heads} "
                     "key/value groups" + (", QK-norm" if cfg.use_qk_norm else "")
                     + (", learned sinks" if cfg.use_attention_sinks else "")
                     + (f", window {cfg.sliding_window}" if cfg.sliding_window else ""),
        "feed-forward": f"{kind}, hidden width {cfg.ffn_width}",
        "vocabulary": f"{cfg.vocab_size:,}, embedding "
                      f"{'tied to' if cfg.tie_embeddings else 'apart from'} the head",
        "context": f"{cfg.context_length:,} tokens",
        "parameters": f"{counts['total']:,}, {counts['active']:,} of them work on a token",
        "training FLOPs per token": f"{flops_per_token(cfg):.2e}",
    }.items()]))
    parts = {name: count for name, count in counts.items() if name not in ("total", "active")}
    page.picture("parameters.png", pictures.parameters, parts,
                 caption="Where the parameters are.")


def data(page: Page) -> None:
    page.add("## Data")
    results = page.run.results
    headings = {(name, spec.counted[0]): spec.counted[1]
                for name, spec in STAGES.items() if spec.counted}
    if not any(results.get(stage, {}).get(key) for stage, key in headings):
        page.missing(NOTEBOOKS[0])
        return
    page.origin()
    for (stage, key), heading in headings.items():
        if rows := results.get(stage, {}).get(key):
            page.add(f"**{heading}**", markdown_table(rows))


def training(page: Page) -> None:
    from modern_llm.report import pictures

    page.add("## Training curves and what each stage measured")
    for stage in (name for name in NOTEBOOKS if not STAGES[name].section):
        page.add(f"### {STAGES[stage].title}")
        if page.missing(stage):
            continue
        results, metrics = page.run.results[stage], page.run.frame(f"{stage}/metrics.jsonl")
        if "margin" in metrics:
            page.picture(f"{stage}_preferences.png", pictures.preference_curves, metrics,
                         caption="Dots: held-out pairs; lines: training batches.")
        floor = results.get("floor")
        page.picture(
            f"{stage}.png", pictures.curves, metrics, floor=floor,
            caption="Training and held-out loss against tokens."
                    + (" Dashed: the entropy floor, below which no model's expected loss lies."
                       if floor else ""))
        if "alarms" in results:
            raised = [f"**{a.get('alarm')}** at step {number(a.get('step'))} ({a.get('detail')})"
                      for a in results["alarms"]]
            page.add(f"Alarms: {'; '.join(raised) or 'none'}.")
        page.add(measures(results.get("table", [])))
        if results.get("variants"):
            page.add("Variants, a few steps each:", markdown_table(results["variants"]))


def samples(page: Page) -> None:
    page.add("## Samples")
    if not any(found.get("samples") for found in page.run.results.values()):
        page.missing(NOTEBOOKS[0])
        return
    for stage, found in page.run.results.items():
        if not found.get("samples"):
            continue
        page.add(f"### {STAGES[stage].title}")
        for item in found["samples"] if isinstance(found["samples"], list) else [found["samples"]]:
            page.add(text_block(item.items() if isinstance(item, dict) else [(stage, item)]))


def attention(page: Page) -> None:
    page.add("## Attention")
    if page.missing("attention"):
        return
    found, folder = page.run.results["attention"], page.run.folder / "attention" / "figures"
    there = []
    for path in sorted(folder.glob("attention_*.png")):
        page.pictures.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, page.pictures / path.name)
        there.append(path.name)
    page.add("\n".join(f"* {sentence}" for sentence in found.get("observations", [])))
    if found.get("roles"):
        rules = [f"{role} ({name} ≥ {threshold:g})"
                 for role, (name, threshold) in found["roles"].items()]
        page.add(f"Roles by threshold: {', '.join(rules)}; a head that reaches none is mixed.")
    if "attention_heads.png" in there:
        page.add(f"![heads]({page.link}/attention_heads.png)",
                 "*Every square is a head; dark is 1.*")
    for name in found.get("examples", {}):
        files = [f"attention_{kind}_{name.replace(', ', '_')}.png" for kind in ("keys", "maps")]
        shown = [f"![{name}]({page.link}/{file})" for file in files if file in there]
        if shown:
            page.add(folded(f"{name}: the head that reads the key words most, and all heads",
                            " ".join(shown)))
    if found.get("heads"):
        page.add(folded("The table of heads", markdown_table(found["heads"])))
    page.add(measures(found.get("table", [])))


def across_seeds(page: Page) -> None:
    page.add("## Across seeds")
    if len(page.seeds) < 2:
        seed = page.run.record.get("seed", 0)
        page.add("**Not run: one seed only.** Intervals elsewhere in this report are over "
                 "held-out items. For another seed: `modern-llm run --preset "
                 f"{shlex.quote(page.run.preset)} --run {page.run.folder.name}-seed{seed + 1} "
                 f"--stage all -p seed={seed + 1}`, then write the report again.")
        return
    table = summarise_seeds([run.folder for run in page.seeds])
    page.origin()
    named = [f"`{run.folder.name}` (seed {run.record.get('seed')})" for run in page.seeds]
    page.add(f"Median and range of {len(named)} runs: {', '.join(named)}.")
    kept = table[~is_aside(table)]
    rows = [{"stage": row["stage"], "task": row["task"], "metric": row["metric"],
             "median": row["median"], "range": f"{number(row['low'])} … {number(row['high'])}",
             "runs": row["runs"]} for row in kept.to_dict("records")]
    page.add(markdown_table(rows))


def reproduce(page: Page) -> None:
    run, record = page.run, page.run.record
    commit = record.get("git_commit", "unknown")
    lines = [f"git checkout {commit.removesuffix('+changes')}"] if commit != "unknown" else []
    lines += [run.command(stage) for stage in NOTEBOOKS if stage in run.params]
    lines.append(
        f"modern-llm run --preset {shlex.quote(run.preset)} --run {run.folder.name} --stage report")
    page.add("## Commands", "Stage by stage, exactly as it was run:",
             "```bash\n" + "\n".join(lines) + "\n```")
    if commit.endswith("+changes"):
        page.add("The tree had changes that were not committed: the commit alone does not give "
                 "this run back.")
    machine = {"commit": commit,
               "device": f"{record.get('device', '')} ({record.get('device_name', '')})",
               **{name: record.get(name) for name in ("threads", "platform", "seed")},
               **record.get("versions", {})}
    page.add("## Hardware, versions, seed", "Of the stage that ran last.",
             markdown_table({"": name, "value": value} for name, value in machine.items()))


def cost(page: Page) -> None:
    from modern_llm.report import pictures

    page.add("## Cost")
    cfg, rows, device = model_of(page.run), [], page.run.record.get("device", "cpu")
    unit = "GPU minutes" if device.startswith("cuda") else "CPU minutes (threads × minutes)"
    threads = 1 if device.startswith("cuda") else page.run.record.get("threads") or 1
    # of the stages that train
    ranks = page.run.record.get("config", {}).get("hardware", {}).get("ranks", 1)
    for stage in NOTEBOOKS:
        seconds, found = (page.run.stages.get(stage, {}).get("seconds"),
                          page.run.results.get(stage, {}))
        if seconds is None:
            continue
        tokens = found.get("tokens")
        trained = found.get("train_seconds")
        rows.append({"stage": stage, "minutes": seconds / 60,
                     "of them training": trained / 60 if trained else None,
                     unit: seconds / 60 * threads * (ranks if trained else 1), "tokens": tokens,
                     "tokens/s": found.get("tokens_per_s"),
                     "training FLOPs": tokens * flops_per_token(cfg) if tokens and cfg else None})
    if not rows:
        page.add("No stage has run.")
        return
    page.picture("cost.png", pictures.cost, {row["stage"]: row["minutes"] for row in rows},
                 caption="Minutes of each stage by the clock.")
    summed = ("minutes", "of them training", unit, "tokens", "training FLOPs")
    rows.append({"stage": "all", **{name: sum(row[name] or 0 for row in rows) for name in summed}})
    for row in rows:
        row["training FLOPs"] = row["training FLOPs"] and f"{row['training FLOPs']:.2e}"
    page.add(markdown_table(rows),
             "FLOPs are the closed form of chapter 11, 3 × the forward pass per token.")


def provenance(page: Page) -> None:
    files = [{"file": str(path.relative_to(page.run.folder)),
              "sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16]}
             for path in page.run.sources_of_the_report()]
    page.add("## Made from", folded(f"{len(files)} files", markdown_table(files)))


SECTIONS = (summary, pipeline, results, stage_gains, verifier, across_seeds, perplexities,
            sentiment, contamination, baselines, training, samples, attention, architecture, data,
            cost, reproduce, provenance)
