"""What came of the sentiment task, as tables: answers that are one label, which label was said, and
rows of a results table. Chapter 43 reads them.
"""

from __future__ import annotations

import pandas as pd

from modern_llm.statistics import mean_interval, paired_difference, proportion_interval


def collapse_table(items: pd.DataFrame, share: float = 0.95) -> pd.DataFrame:
    """shots, method, draws, collapsed, words: in how many draws at least `share` of the answers are
    one label.
    """
    rows, answered = [], items[items.said != ""]
    for (shots, method), group in answered.groupby(["shots", "method"], sort=False):
        tops = [(says.value_counts(normalize=True).index[0],
                 says.value_counts(normalize=True).iloc[0])
                for _, says in group.groupby("draw").said]
        labels = [label for label, part in tops if part >= share]
        often = " or ".join(repr(label) for label in sorted(set(labels)))
        words = (f"in {len(labels)} of {len(tops)} draws it says {often} to at least {share:.0%} "
                 "of the sentences: a constant answer" if labels else "")
        rows.append({"shots": shots, "method": method,
                     "draws": len(tops), "collapsed": len(labels), "words": words})
    return pd.DataFrame(rows)


def confusion_table(items: pd.DataFrame) -> pd.DataFrame:
    """How often each label was answered by each, summed over the draws; one line for shots, method
    and true label.
    """
    said = items.said.where(items.said != "", "(none)")
    return pd.crosstab([items.shots, items.method, items.label], said.rename("said"))


def accuracy_rows(items: pd.DataFrame) -> list[dict]:
    """Rows of a results table: metric, value, low, high, n and protocol, for every number of shots
    and method.

    "accuracy, 4-shot, direct" averages the draws, with an interval over reviews; "…, over draws"
    has the same value between the worst and the best draw, n draws; "… minus majority class" and "…
    minus direct" are paired by review. "majority class" is the accuracy of always giving the
    commonest label.
    """
    answered, everything = items[items.said != ""], items.item.nunique()
    truth = answered.groupby("item").label.first()
    majority = (truth == truth.value_counts().index[0]).astype(float)
    rows = [{"metric": "majority class", **proportion_interval(majority.sum(), len(majority)),
             "protocol": f"always {truth.value_counts().index[0]!r}"}]
    collapsed, means = collapse_table(items).set_index(["shots", "method"]).words, {}
    left_out = everything - len(truth)
    for (shots, method), group in answered.groupby(["shots", "method"], sort=False):
        right = (group.said == group.label).astype(float)
        of_item, of_draw = right.groupby(group.item).mean(), right.groupby(group.draw).mean()
        means[shots, method] = of_item
        remarks = [f"label word, {shots} demonstrations, mean of {len(of_draw)} draws" if shots
                   else "label word, no demonstrations"]
        if group.shown.mean() < shots:
            remarks.append(f"{group.shown.mean():.1f} of {shots} demonstrations fit into the "
                           "context on average")
        if left_out:
            remarks.append(
                f"{left_out} of {everything} reviews left out: no text, or longer than the context")
        remarks += [collapsed[shots, method]] * bool(collapsed[shots, method])
        name, protocol = f"accuracy, {shots}-shot, {method}", "; ".join(remarks)
        interval = (mean_interval(of_item) if len(of_draw) > 1
                    else proportion_interval(of_item.sum(), len(of_item)))
        rows.append({"metric": name, **interval, "protocol": protocol})
        if len(of_draw) > 1:
            rows.append({"metric": f"{name}, over draws", "value": of_draw.mean(),
                         "low": of_draw.min(), "high": of_draw.max(),
                         "n": len(of_draw), "protocol": "lowest and highest accuracy of a draw"})
        others = {"majority class": majority,
                  "direct": means.get((shots, "direct")) if method != "direct" else None}
        rows += [{"metric": f"{name} minus {other}",
                  **paired_difference(of_item, values), "protocol": "paired by review"}
                 for other, values in others.items() if values is not None]
    return rows
