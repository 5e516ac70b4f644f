"""What the verifier is worth, as a section of a report: its judgement, the ways to choose, and its
mistakes in full. No torch.
"""

from __future__ import annotations

from modern_llm.config import STAGES
from modern_llm.evaluation.families import TRAINED_ON
from modern_llm.report.page import Page, bullets, in_words, interval, measured, measures, quoted
from modern_llm.report.verdicts import way

# the rows of the stage's own table that are shown here; the others stand with its curves
TELLING = ("within-problem AUC", "calibration error", "weighted_vote@", "best_of_n@", "majority@",
           "greedy exact match")
# a control that the generator trained on replaces, where there is one
LESS_FAIR = ("the verifier's own language model", "gained by the training")
MISTAKES = {"false positives": "Wrong answers it likes most",
            "false negatives": "Right answers it likes least",
            "right without an end": "Right answers that do not end"}
MOST_MISTAKES = 3  # of a kind


def verifier(page: Page) -> None:
    from modern_llm.evaluation import charts

    page.add("## What the verifier is worth")
    if page.missing("verifier"):
        return
    found = page.run.results["verifier"]
    page.origin([page.run.record.get("config", {}).get("verifier", {}).get("problems", "")])
    table = found.get("table", [])
    controlled = any(TRAINED_ON in row["metric"] for row in table)
    page.add(measures(row for row in table if row["metric"].startswith(TELLING)
                      and not (controlled and row["metric"].endswith(LESS_FAIR))))
    if found.get("rerank"):
        table = measured(found["rerank"])
        last = table[table["size"] == table["size"].max()]
        shares = ", ".join(f"{way(row['method'] + '@' + str(row['size']))} {interval(row)}"
                           for row in last.to_dict("records"))
        greedy = {row["metric"].removeprefix("greedy exact match, "): row["value"]
                  for row in found.get("table", [])}
        page.picture("rerank.png", charts.rerank_curves, table, greedy.get("generator"),
                     greedy.get(TRAINED_ON), title="Ways to choose",
                     caption="The verifier stage's held-out problems: share right by way of "
                             f"choosing; bands are 95% intervals. {shares}.")
    if found.get("calibration"):
        page.picture("calibration.png", charts.reliability_curve, measured(found["calibration"]),
                     caption="Calibration: below the dashed line the verifier is too sure.")
    curves = page.run.json("eval/gsm8k_analysis.json").get("curves", {})
    for stage in dict.fromkeys(row["stage"] for rows in curves.values() for row in rows):
        rows = [{"method": method, **row} for method, line in curves.items()
                for row in line if row["stage"] == stage]
        how = "with" if stage == STAGES["verifier"].called else "without"
        page.picture(f"rerank_eval_{stage}.png", charts.rerank_curves, measured(rows),
                     caption=f"The evaluation's problems: choices {how} the verifier's scores; "
                             "pass: at least one answer is right.")
    mistakes_of(page)


def mistakes_of(page: Page) -> None:
    """Three cases of each kind, one below the other; of wrong answers the right one, too."""
    for kind, cases in page.run.json("eval/verifier_mistakes.json").items():
        shown = []
        for one in cases[:MOST_MISTAKES]:
            score = "unknown" if one["score"] is None else f"{one['score']:.2f}"
            right = quoted(one["gold"].rpartition("\n")[2])
            shown.append(f"score {score}: {quoted(one['question'])} → {quoted(one['answer'])}"
                         + f" (should be {right})" * (kind == "false positives"))
        page.add(f"**{MISTAKES.get(kind, in_words(kind))}:**" + ("\n" + bullets(shown) if shown
                                                                 else " none."))
