"""What chapter 06 measures of a trained verifier: planted errors, its score token by token, its
controls, and other designs on the same data.

A plain module; what is done with its scores is chapter 48.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
from tokenizers import Tokenizer

from modern_llm.data.answer_pairs import perturb
from modern_llm.data.tasks import Problem, rerank, rerank_curve
from modern_llm.evaluation.reranking import judgements, trained_on_rows
from modern_llm.models.saving import load_model
from modern_llm.models.verifier import VerifierModel, load_verifier
from modern_llm.statistics import paired_difference
from modern_llm.training.control import FOLDER
from modern_llm.training.verifier import VerifierTraining
from modern_llm.training.verifier_scores import score_answers, score_samples, token_scores

# name in the tables -> column of the samples
SIGNALS = {"verifier": "score", "mean log-probability": "log_prob",
           "calculator consistency": "consistent"}


def weights_table(verifier: VerifierModel) -> pd.DataFrame:
    """What each part of the score weighs: as trained, and as calibrated."""
    trained = {"head": 1.0}
    if verifier.surprise is not None:
        trained |= dict(zip(("sum", "minimum"), verifier.surprise.tolist()))
    calibrated = dict(zip(("head", "sum", "minimum", "shift"), verifier.calibration.tolist()))
    return pd.DataFrame({"as trained, at every token": trained,
                         "calibrated, at the end": calibrated}).round(3)


def planted_error(verifier: VerifierModel, tokenizer: Tokenizer, problems: Sequence[Problem],
                  seed: int = 1) -> dict:
    """What the score loses when one number of a gold answer is changed, as a table row."""
    draw, answers = random.Random(seed), [problem.answer for problem in problems]
    whole = score_answers(verifier, tokenizer, problems, answers)
    spoilt = score_answers(verifier, tokenizer, problems, [perturb(a, draw) for a in answers])
    return {"metric": "score lost by a planted error", **paired_difference(whole, spoilt),
            "protocol": "gold answers of held-out problems, one number changed; lower in "
                        f"{(spoilt < whole).sum()} of {len(problems)}"}


def answer_strips(verifier: VerifierModel, tokenizer: Tokenizer,
                  problem: Problem) -> dict[str, tuple[list[str], np.ndarray]]:
    """`token_scores` of a problem's gold answer, and of a copy whose middle number is two too high;
    each by its heading.
    """
    numbers = list(re.finditer(r"\d+", problem.answer))
    middle = numbers[len(numbers) // 2]
    changed = str(int(middle[0]) + 2)
    other = problem.answer[:middle.start()] + changed + problem.answer[middle.end():]
    return {"right": token_scores(verifier, tokenizer, problem, problem.answer),
            f"{middle[0]} changed to {changed}": token_scores(verifier, tokenizer, problem, other)}


def measures(rows: Sequence[dict]) -> pd.DataFrame:
    """Table rows as numbers: value, low, high and n of every metric."""
    table = pd.DataFrame(rows).drop(columns="protocol").set_index("metric")
    return table.astype({"value": float, "low": float, "high": float}).round(3)


def own_answers(recipe: VerifierTraining, verifier: VerifierModel, greedy: pd.Series) -> pd.Series:
    """1 or 0 for every held-out problem: whether the verifier's own language model is right. An
    encoder has none; then the generator's `greedy` ones.
    """
    if verifier.is_encoder:
        return greedy
    found = recipe.answers("own-greedy", lambda: verifier.model, recipe.held_problems)
    return found.set_index("problem").right.astype(float)


class TrainedOn:
    """The generator trained on (`VerifierTraining.control`): its answers to the held-out problems,
    asked for as the generator's own were; none where there is no such control.
    """

    def __init__(self, recipe: VerifierTraining):
        self.greedy = self.samples = None
        if recipe.train.trains_control:
            load = cache(lambda: load_model(recipe.run.folder / FOLDER / "checkpoint",
                                            recipe.device))
            greedy = recipe.answers("control-greedy", load, recipe.held_problems)
            self.greedy = greedy.set_index("problem").right.astype(float)
            self.samples = recipe.answers("control", load, recipe.held_problems, **recipe.sampling)

    @property
    def share(self) -> float | None:
        """Right greedy answers, of all problems."""
        return None if self.greedy is None else self.greedy.mean()

    def curve(self, held: pd.DataFrame, sizes: Sequence[int]) -> pd.DataFrame:
        """`tasks.rerank_curve` of the generator's samples, and the majority of the control's own as
        one more method.
        """
        table = rerank_curve(held, sizes)
        if self.samples is None:
            return table
        own = rerank_curve(self.samples, sizes, ["majority"])
        return pd.concat([table, own.assign(method="majority_trained_on")], ignore_index=True)

    def rows(self, held: pd.DataFrame, size: int) -> list[dict]:
        """`reranking.trained_on_rows` against the generator's samples with their scores."""
        return ([] if self.samples is None
                else trained_on_rows(held, self.greedy, self.samples, size))


def compare_variants(recipe: VerifierTraining, trained_steps: int, size: int) -> list[dict]:
    """The AUCs of other designs after the same few steps on the same data, and what a vote of
    `size` answers makes of them; none if `comparison_steps` is 0.

    Args:
        recipe: whose `held` samples carry the verifier's scores, in a column `score`.
        trained_steps: of that verifier, which is not trained again if it was trained as long.
    """
    train, run, compared = recipe.train, recipe.run, []
    variants = {"with surprise": train, "without surprise": replace(train, surprise=False),
                # from random weights: all of it learns
                "encoder": replace(train, kind="encoder", lora_rank=0, lora_alpha=None)}
    for name, cfg in variants.items() if train.comparison_steps else ():
        steps, samples = train.comparison_steps, recipe.held
        if cfg != train or steps != trained_steps:
            cfg = replace(cfg, max_steps=steps, max_minutes=None, keep_checkpoints=0,
                          eval_every=steps, checkpoint_every=steps)
            other = recipe.trainer(cfg, run.folder / "variants" / name.replace(" ", "-"))
            run.require(other.fit().stopped)
            judge = load_verifier(other.files.checkpoint, run.device)
            samples = samples.assign(score=score_samples(
                judge, recipe.tokenizer, samples, recipe.held_problems))
        pooled, within = judgements(samples, {name: "score"})
        compared.append({"variant": name, "steps": steps, "pooled AUC": pooled["value"],
                         "within-problem AUC": within["value"], "low": within["low"],
                         "high": within["high"], "problems": within["n"],
                         "weighted vote": rerank(samples, size, "weighted_vote").mean()})
    return compared


def variants_table(compared: Sequence[dict]) -> pd.DataFrame | str:
    """`compare_variants` as a table; a sentence where there were none."""
    if not compared:
        return "comparison_steps is 0: no variants in this run"
    return pd.DataFrame(compared).set_index("variant").round(3)
