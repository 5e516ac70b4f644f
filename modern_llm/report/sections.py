"""The sections of a report that are no measurement of the evaluation, and all of them in order,
behind the first page. One whose stage has not run says so, with the command that fills it. No
torch.
"""

from __future__ import annotations

import itertools
import shlex
import shutil
from collections.abc import Iterable

from modern_llm.config import NOTEBOOKS, STAGES
from modern_llm.evaluation.families import FAMILIES, TRAINED_ON
from modern_llm.models.counts import flops_per_token, parameter_count
from modern_llm.report.evaluation import (
    baselines, contamination, perplexities, results, sentiment, stage_gains,
)
from modern_llm.report.first_page import first_page, model_of
from modern_llm.report.page import (
    Page, bullets, folded, in_words, markdown_table, measures, model_name, number, text_block,
)
from modern_llm.report.seeds import summarise_seeds
from modern_llm.report.verifier import TELLING, verifier


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
    heads = (f"{cfg.num_heads} heads of {cfg.head_width} channels, {cfg.num_kv_heads} key/value "
             "groups" + ", QK-norm" * cfg.use_qk_norm + ", learned sinks" * cfg.use_attention_sinks
             + (f", window {cfg.sliding_window}" if cfg.sliding_window else ""))
    active = (f", {counts['active']:,} of them work on a token"
              if counts["active"] != counts["total"] else "")
    page.add("A decoder-only transformer, RMSNorm before each branch, rotary positions: "
             f"{cfg.num_layers} layers of width {cfg.width}; attention: {heads}; feed-forward: "
             f"{kind}, hidden width {cfg.ffn_width}; vocabulary {cfg.vocab_size:,}, embedding "
             f"{'tied to' if cfg.tie_embeddings else 'apart from'} the head; context "
             f"{cfg.context_length:,} tokens; {counts['total']:,} parameters{active}; "
             f"{flops_per_token(cfg):.2e} training FLOPs per token.")
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
            page.add(f"**{heading}:**\n" + bullets(map(counted, rows)))


def counted(row: dict) -> str:
    """A row of counts in words, without what is 0 or empty: `synthetic, train: documents 9`."""
    named = {name: value for name, value in row.items()
             if isinstance(value, str) and name in ("", "source", "split", "pairs")}
    rest = [f"{name} {number(value)}" for name, value in row.items()
            if name not in named and value not in (None, "", 0) and value == value]
    return f"{', '.join(named.values())}: {', '.join(rest)}"


def training(page: Page) -> None:
    from modern_llm.report import pictures

    page.add("## Training curves and what each stage measured",
             "Training and held-out loss against tokens; dashed: the entropy floor, below which no "
             "model's expected loss lies. Of preferences, dots are held-out pairs, lines training "
             "batches.")
    rows, shown, said = [], [], []
    for stage in (name for name in page.run.wanted if not STAGES[name].section):
        if page.missing(stage):
            continue
        title = STAGES[stage].title
        results, metrics = page.run.results[stage], page.run.frame(f"{stage}/metrics.jsonl")
        if "margin" in metrics:
            shown.append(page.drawn(f"{stage}_preferences.png", pictures.preference_curves, metrics,
                                    title=f"{title}: preferences"))
        shown.append(page.drawn(f"{stage}.png", pictures.curves, metrics,
                                floor=results.get("floor"), title=f"{title}: loss"))
        if results.get("alarms") == []:
            said.append(f"{STAGES[stage].shown} raised no alarm.")
        if results.get("variants"):
            said += ["Variants of the verifier, a few steps each:",
                     markdown_table(results["variants"])]
        rows += [{**row, "stage": stage} for row in own_measures(page, stage)]
    page.add("\n".join(filter(None, shown)), measures(rows) if rows else "", *said)
    if "eval" in page.run.results:
        page.add("Of each stage's own measures the first; the others are in the stages' files in "
                 f"`{page.files}/`.")


def own_measures(page: Page, stage: str) -> list[dict]:
    """What a stage measured itself: all of it, or the first where the evaluation has the rest; of
    the verifier what its section has not.
    """
    rows = page.run.results[stage].get("table", [])
    if stage == "verifier":
        return [row for row in rows if not row["metric"].startswith((*TELLING, "pooled AUC"))]
    return (STAGES[stage].telling(rows) or rows) if "eval" in page.run.results else rows


MOST_SAMPLES, MOST_LINES = 2, 7  # of a stage


def samples(page: Page) -> None:
    page.add("## Samples")
    if not any(found.get("samples") for found in page.run.results.values()):
        page.missing(NOTEBOOKS[0])
        return
    for stage, found in page.run.results.items():
        # the evaluation has the verifier's mistakes among more answers
        if not found.get("samples") or (
                stage == "verifier" and page.run.json("eval/verifier_mistakes.json")):
            continue
        page.add(f"**{STAGES[stage].title}:**\n" + text_block(few(
            [(model_name(name), value) for name, value in item.items()]
            if isinstance(item, dict) else [("continued", item)]
            for item in texts_of(found["samples"]))))
    page.add(f"All samples are in the stages' files in `{page.files}/`.")


def few(cases: Iterable[list[tuple[str, object]]]) -> list[list[tuple[str, object]]]:
    """The first cases, as far as they fit in some lines; one at least."""
    kept, lines = [], 0
    for case in itertools.islice(cases, MOST_SAMPLES):
        lines += 1 + sum(1 + str(value).count("\n") for _, value in case)
        if kept and lines > MOST_LINES:
            break
        kept.append(case)
    return kept


def texts_of(samples: list | dict) -> list:
    """Samples one by one, also where they are kept by column: {"problem": […], "sft": […]}."""
    if isinstance(samples, list):
        return samples
    if all(isinstance(values, list) for values in samples.values()):
        return [dict(zip(samples, values)) for values in zip(*samples.values())]
    return [samples]


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
    page.add(bullets(found.get("observations", [])))
    rules = ", ".join(f"{role} ({name} ≥ {threshold:g})"
                      for role, (name, threshold) in found.get("roles", {}).items())
    if "attention_heads.png" in there:
        page.add(f"![heads]({page.link}/attention_heads.png)\n*Every square is a head; dark is 1."
                 + f" Roles by threshold: {rules}; a head that reaches none is mixed." * bool(rules)
                 + "*")
    shown = []
    for name in found.get("examples", {}):
        files = [f"attention_{kind}_{name.replace(', ', '_')}.png" for kind in ("keys", "maps")]
        shown.append(" ".join(f"![{name}]({page.link}/{file})" for file in files if file in there))
    if any(shown):
        page.add(folded("Examples: the head that reads the key words most, and all heads",
                        "\n".join(filter(None, shown))))
    page.add(measures(row for row in found.get("table", [])
                      if not row["metric"].startswith("p(answer)")))


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
    named = [f"`{run.folder.name}` (seed {run.record.get('seed')})" for run in page.seeds]
    page.add(f"Median and range of {len(named)} runs: {', '.join(named)}. The first measures only: "
             "*own table* is what a stage itself measured, the tasks are the evaluation's.")
    lines: dict[tuple, dict] = {}
    for row in (row for row in table.to_dict("records") if is_first(row)):
        named = model_name(STAGES[row["stage"]].called if row["task"] == "own table"
                           else row["stage"]) or row["stage"]
        fewer = f", {row['runs']} runs" if row["runs"] < len(page.seeds) else ""
        lines.setdefault((row["task"], row["metric"]), {
            "task": row["task"], "metric": in_words(row["metric"])})[named] = (
                f"{number(row['median'])} ({number(row['low'])} … {number(row['high'])}{fewer})")
    page.add(markdown_table(lines.values()))


def is_first(row: dict) -> bool:
    """Whether a measure over seeds is the most telling of a stage, is a difference to its control,
    is on the first page, or has a chance of its own.
    """
    stage, task, metric = row["stage"], row["task"], row["metric"]
    if task == "own table":
        to_control = "after - control" in metric or " - " in metric and TRAINED_ON in metric
        return to_control or (
            STAGES[stage].recipe != "" and metric.startswith(STAGES[stage].headline[:1])
            and (stage != "verifier" or metric.endswith(", verifier")))
    if stage == STAGES["verifier"].called and "@" in metric:
        return " minus " in metric
    family = FAMILIES.get(task)
    return (family is not None and not family.section and " calculator" not in task
            and family.leads(metric) or metric.startswith("perplexity tax"))


def machine(page: Page) -> None:
    record = page.run.record
    found = {"commit": record.get("git_commit", "unknown"), "platform": record.get("platform"),
             "seed": record.get("seed"), **record.get("versions", {})}
    page.add("## Hardware, versions, seed",
             f"Of the stage that ran last: {record.get('device', '')} "
             f"({record.get('device_name', '')}); "
             + ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)
             + f". The report is made from {len(page.run.sources_of_the_report())} files of the "
             f"run and nothing else: [names and SHA-256]({page.files}/made_from.csv).")


SECTIONS = (first_page, results, stage_gains, verifier, across_seeds, perplexities, sentiment,
            contamination, baselines, training, samples, attention, architecture, data, machine)
