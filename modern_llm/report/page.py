"""What a report is made of: the files of a run, read when asked for, and a page of Markdown with
pictures. No torch.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from modern_llm.config import ALWAYS, BUILT_IN, NOTEBOOKS, STAGES
from modern_llm.files import read_json
from modern_llm.messages import UserError

if TYPE_CHECKING:
    import pandas as pd

# of the evaluation, published beside a report; all but the first five follow from the ledger
PUBLISHED = ("ledger.csv", "contamination.csv", "clean_scores.csv", "verifier_mistakes.json",
             "baseline_comparison.json", "comparison_table.csv", "stage_gains.csv",
             "gsm8k_analysis.json",
             *(f"{spec.called}_eval.json" for spec in STAGES.values() if spec.called),
             "checkpoint_eval.json")
EVAL_FILES = (*PUBLISHED, "stage_ledger.csv", "task_metrics.json")
# published packed: every item's scores, and what was asked and said, which the site shows
ITEM_FILES = ("items.csv", "answers.jsonl")


class ReportError(UserError, ValueError):
    """The report cannot be written. The message names the value, the place and the remedy."""


# ---- names ------------------------------------------------------------------------------------


def model_name(stage: str) -> str:
    """How prose calls the model that the files call `stage`: "pretrained" for "base"."""
    return next((spec.shown for spec in STAGES.values() if spec.called == stage), stage)


def in_words(text: str) -> str:
    """A metric or protocol of the files as prose, where the first model is the pretrained one."""
    return re.sub(r"\bbase\b", "pretrained", re.sub(r"\b(the) base('s)?(?!\w)",
                                                    r"\1 pretrained model\2", str(text)))


# ---- Markdown ------------------------------------------------------------------------------------


def number(value: object) -> str:
    """Three decimals, fewer of large numbers, thousands apart; what is not a number, as it is;
    nothing for None.
    """
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    if abs(value) < 1e-15:  # what rounding leaves of zero
        value = 0.0
    if value == 0 or 5e-4 <= abs(value) < 1e6:
        digits = 3 if abs(value) < 100 else 1 if abs(value) < 10_000 else 0
        return f"{value:,.{digits}f}"
    return f"{value:.5f}" if 1e-5 <= abs(value) < 1 else f"{value:.2e}"


def interval(row: dict) -> str:
    """`0.397 [0.388, 0.406]`, or the value alone; of a single item the resampled interval would say
    nothing.
    """
    low, high = row.get("low"), row.get("high")
    if row.get("n") == 1 and low == high is not None:
        return f"{number(row.get('value'))} (n = 1)"
    known = low is not None and high is not None and low == low and high == high
    return (f"{number(row.get('value'))} [{number(low)}, {number(high)}]" if known
            else number(row.get("value")))


def measured(rows: Iterable[dict]) -> pd.DataFrame:
    """Rows as a table to draw from: what is not known of value, low and high is NaN, even where
    nothing is.
    """
    import pandas as pd

    table = pd.DataFrame(list(rows))
    return table.astype({name: float for name in ("value", "low", "high") if name in table})


def markdown_table(rows: Iterable[dict], columns: Sequence[str] | None = None) -> str:
    """Rows as a Markdown table; columns are those of any row, in the order they appear."""
    rows = list(rows)
    columns = list(columns or dict.fromkeys(name for row in rows for name in row))
    cell = lambda value: number(value).replace("|", "\\|").replace("\n", " ⏎ ")
    lines = ["| " + " | ".join(map(cell, columns)) + " |", "|" + "---|" * len(columns)]
    return "\n".join(
        lines + ["| " + " | ".join(cell(row.get(name)) for name in columns) + " |" for row in rows])


def measures(table: Iterable[dict]) -> str:
    """A stage's own table: metric, value with interval, n, protocol."""
    return markdown_table([{**{name: row[name] for name in ("stage",) if name in row},
                            "metric": in_words(row["metric"]),
                            "value [95% interval]": interval(row), "n": row.get("n"),
                            "protocol": in_words(row.get("protocol", ""))} for row in table])


def folded(summary: str, text: str) -> str:
    """Text that opens on a click."""
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


def text_block(cases: Iterable[Iterable[tuple[str, object]]], longest: int = 300) -> str:
    """Headed texts as they are, one below the other, a blank line between the cases."""
    clean = lambda text: str(text)[:longest] + (" […]" if len(str(text)) > longest else "")
    body = "\n\n".join("\n".join(f"[{name}] {clean(value)}" for name, value in case)
                       for case in cases)
    return "```text\n" + body.replace("```", "'''") + "\n```"


def quoted(text: object, longest: int = 300) -> str:
    """A text on one line, as it is."""
    text = str(text).strip().replace("`", "'").replace("\n", " ⏎ ")
    return f"`{text[:longest]}`" + " […]" * (len(text) > longest)


def bullets(lines: Iterable[str]) -> str:
    """Lines as a Markdown list."""
    return "\n".join(f"* {line}" for line in lines)


# ---- the files of a run --------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a run left behind, read when asked for; what is absent is empty. `lay_in` is where its
    folder lay when it ran, if that is elsewhere now.
    """

    folder: Path
    lay_in: Path | None = None

    def json(self, name: str) -> dict:
        path = self.folder / name
        if not path.is_file():
            return {}
        try:
            return read_json(path)
        except (OSError, ValueError) as error:
            raise ReportError(f"{error}: delete it and run that stage again") from error

    @cached_property
    def record(self) -> dict:
        return self.json("run.json")

    @cached_property
    def results(self) -> dict[str, dict]:
        """results.json of every stage that has one."""
        return {stage: found for stage in NOTEBOOKS
                if (found := self.json(f"{stage}/results.json"))}

    @cached_property
    def params(self) -> dict[str, dict]:
        return {stage: found for stage in NOTEBOOKS if (found := self.json(f"{stage}/params.json"))}

    @property
    def stages(self) -> dict[str, dict]:
        """Status, start and seconds of the stages, from `run.json`."""
        return self.record.get("stages", {})

    @property
    def wanted(self) -> list[str]:
        """The stages that make the run whole: of those that are optional, the ones begun."""
        return [stage for stage in NOTEBOOKS if stage in ALWAYS or stage in self.stages]

    @property
    def alarms(self) -> list[tuple[str, dict]]:
        """(stage, alarm) of those that stages raised over their own metrics."""
        return [(stage, alarm) for stage, found in self.results.items()
                for alarm in found.get("alarms", [])]

    @property
    def preset(self) -> str:
        named = [str(params["preset"]) for params in self.params.values() if params.get("preset")]
        return named[0] if named else self.record.get("preset", "")

    @property
    def sources(self) -> list[str]:
        """Every data set that the run's settings name."""
        named = []
        for path in ("data.sources", *(path for stage in self.results
                                       for path in STAGES[stage].data)):
            section, _, name = path.partition(".")
            value = self.record.get("config", {}).get(section, {}).get(name, [])
            named += [value] if isinstance(value, str) else value
        return [name for name in dict.fromkeys(named) if name not in ("", "text")]

    def command(self, stage: str, preset: str = "") -> str:
        """The command that runs this stage as it was run, or would be."""
        given = self.params.get(stage, {})
        preset = str(given.get("preset") or preset or self.preset)
        words = ["modern-llm", "run", "--preset", preset, "--run", self.folder.name,
                 "--stage", stage]
        for name in ("checkpoint", "output_dir", "max_steps"):
            if given.get(name) not in (None, ""):
                words += [f"--{name.replace('_', '-')}", self._from_the_checkout(str(given[name]))]
        for name in ("seed", "max_minutes", "device", "overrides"):
            if given.get(name) not in (None, ""):
                words += ["-p", f"{name}={given[name]}"]
        return shlex.join(words)

    def _from_the_checkout(self, value: str) -> str:
        """A path beside this run's folder, as one writes it where runs/ lies: another machine has
        another root.
        """
        root = (self.lay_in or self.folder.resolve()).parent.parent
        return str(Path(value).relative_to(root)) if Path(value).is_relative_to(root) else value

    def frame(self, name: str) -> pd.DataFrame:
        """A CSV or JSON-lines file as a table; empty if there is none."""
        import pandas as pd

        path = self.folder / name
        if not path.is_file() or not path.stat().st_size:
            return pd.DataFrame()
        if path.suffix == ".csv":
            empty = {column: [""] for column in ("value", "change", "low", "high", "n")}
            return pd.read_csv(path, keep_default_na=False, na_values=empty)
        return pd.read_json(path, lines=True)

    @cached_property
    def ledger(self) -> pd.DataFrame:
        """The ledger of the evaluation; empty if there is none."""
        return self.frame("eval/ledger.csv")

    @cached_property
    def gains(self) -> pd.DataFrame:
        """The differences of the ledger, `significant` as booleans and `p` as numbers; empty if
        there are none.
        """
        import pandas as pd

        table = self.frame("eval/stage_gains.csv")
        if table.empty:
            return table
        p = pd.to_numeric(table.p, errors="coerce") if "p" in table else float("nan")
        return table.assign(significant=table.significant.astype(str) == "True", p=p)

    def sources_of_the_report(self) -> list[Path]:
        """The files a report is made from."""
        names = [f"{stage}/{name}" for stage in NOTEBOOKS
                 for name in ("params.json", "metrics.jsonl", "results.json")]
        paths = [self.folder / name for name in [*names, *(f"eval/{name}" for name in EVAL_FILES)]]
        return [path for path in paths if path.is_file()]


@dataclass
class Page:
    """A report in the making: its run, where its pictures go, how the text calls their folder
    (`link`) and that of the published numbers (`files`), the text so far, and the results that the
    first page has.
    """

    run: Run
    pictures: Path
    link: str
    files: str
    seeds: list[Run] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    results: dict[str, list[dict]] = field(default_factory=dict)

    def add(self, *texts: str) -> None:
        self.parts += [text for text in texts if text]

    def picture(self, name: str, draw: Callable, *arguments, **options) -> None:
        """Show a figure, if there is anything to draw; the options are those of `drawn`."""
        self.add(self.drawn(name, draw, *arguments, **options))

    def drawn(self, name: str, draw: Callable, *arguments, caption: str = "", title: str = "",
              **options) -> str:
        """Draw a figure and save it in the pictures' folder: how the text shows it, "" if there is
        nothing to draw.
        """
        if (figure := draw(*arguments, **options)) is None:
            return ""
        import matplotlib.pyplot as plt

        from modern_llm.figures import small_png

        self.pictures.mkdir(parents=True, exist_ok=True)
        (self.pictures / name).write_bytes(small_png(figure))
        plt.close(figure)
        shown = f"![{title or caption or name}]({self.link}/{name})"
        return f"{shown}\n*{caption}*" if caption else shown

    def missing(self, *stages: str) -> bool:
        """Whether none of the stages has results; if so, say what to do about it."""
        if any(stage in self.run.results for stage in stages):
            return False
        for stage in stages:
            status = self.run.stages.get(stage, {}).get("status")
            said = f"{stage}: not run." if not status else f"{stage}: {status}, no results."
            self.add(f"**{said}** This fills it in:\n\n```bash\n{self.run.command(stage)}\n```")
        return True

    def origin(self, names: Iterable[str] | None = None, short: bool = True) -> None:
        """Say beside the numbers which of the data are synthetic."""
        names = self.run.sources if names is None else list(names)
        made_up = [name for name in names if name in BUILT_IN]
        if made_up:
            real = [name for name in names if name not in made_up]
            text = f"**Synthetic data:** {', '.join(f'`{name}`' for name in made_up)}"
            if not short:
                text += (" are written by a program, with known answers: numbers on them say what "
                         "the method does, not how the model fares on human text")
            self.add(f"> {text}."
                     + (f" Real data: {', '.join(f'`{name}`' for name in real)}." if real else ""))
