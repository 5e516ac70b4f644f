"""The tasks of the evaluation, one entry each: how a model is put to it, what becomes an item of
the ledger, the protocol in words, which metrics are told first, and where the report shows them.

An entry is all there is to add for a new task: the evaluation goes through FAMILIES, and so do the
record and the report. Its functions are named, not imported, so that a report needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from modern_llm.config import (
    BUILT_IN, STAGES, PipelineConfig, Work, function_of, is_part_of_all,
)
from modern_llm.config.work import answers

SAMPLED = "problems, sampled"  # the task that costs most: of the last model only
INSTRUCTION_TOKENS = 40  # of an answer to a built-in instruction, at most
SENTENCE_TOKENS = 20  # of a sentence and what stands around it, assumed


@dataclass(frozen=True)
class TaskFamily:
    """One task of the evaluation. A function may be given as itself or by where it is,
    "package.module:name".

    Args:
        name: in the ledger.
        measure: (items, model under test) -> a table of what the model did, item by item.
        items: (items, stage, that table) -> the ledger's items of it, as tables of `item_rows`.
        protocol: (items, stage, how the stage is asked, "" if it is not, the sampled stage) -> in
            words.
        headline: the metrics that the record shows first; one that ends with a space is the
            beginning of several, `@all` stands for all samples.
        panels: how the metrics begin that have a panel in the report's figure of results; None =
            those of the headline.
        aside: a pattern of the metrics that are parts or kinds, which neither results nor changes
            in the report show.
        section: the task has a section of its own in the report, in place of its lines there.
        less_is_better: whether a smaller value is the better one.
        chance: what is right without any skill, or the metric of the same stage that says it; None
            where nothing is.
        seeded: whether the run's seed decides which items of a built-in source are asked.
        compared: the metric by which a model from elsewhere is set beside the last stage; "" if by
            none.
        texts: items -> the texts of the task, one an item, that are looked up in the training
            text; "" if none are.
        put_to: "all"; "stages", of the run, no models from elsewhere; or the "last" of them.
        rows: (items, stage, table) -> ledger rows that are no means over items; "" if there are
            none.
        answers: (items, stage, table) -> what a reader of the items is shown, a table of
            `measuring.told`; "" if no more than their scores.
        data: the setting that names the data set of those texts; "" = they are built in.
        work: config -> what it takes of one model, for the estimate of a job; None counts as none.
    """

    name: str
    measure: Callable | str
    items: Callable | str
    protocol: Callable | str
    headline: Sequence[str] = ()
    panels: Sequence[str] | None = None
    aside: str = ""
    section: bool = False
    less_is_better: bool = False
    chance: float | str | None = None
    seeded: bool = False
    compared: str = ""
    texts: Callable | str = ""
    rows: Callable | str = ""
    answers: Callable | str = ""
    data: str = ""
    put_to: str = "all"
    work: Callable[[PipelineConfig], Work] | None = None

    def call(self, part: str, *arguments: object) -> object:
        """What the function of a part, such as "measure", returns."""
        return function_of(getattr(self, part))(*arguments)

    def leads(self, metric: str, most: int = 0) -> bool:
        """Whether a metric is of the headline, `most` samples being all."""
        names = [name.replace("@all", f"@{most}") for name in self.headline]
        return any(metric == name or name[-1] == " " and metric.startswith(name) for name in names)


TRAINED_ON = "the generator trained on"  # the verifier's control, in the names of its rows


def protocol_sources(config: PipelineConfig) -> list[str]:
    """The sources whose text is scored in the protocols, "text" standing for those of
    pretraining.
    """
    named = (config.data.sources if source == "text" else [source]
             for source in config.eval.protocol_sources)
    return list(dict.fromkeys(name for names in named for name in names))


def has_instructions(config: PipelineConfig) -> bool:
    """Whether the built-in instructions are asked: where the model was trained on their kind."""
    return bool(set(BUILT_IN) & set(config.sft.sources))


def _written(config: PipelineConfig, prompts: int, samples: int = 1, longest: int = 0) -> Work:
    return answers(prompts, config.model.context_length, longest or config.eval.max_new_tokens,
                   samples, config.eval.batch_rows)


def _sentiment_work(config: PipelineConfig) -> Work:
    """Four prompts a sentence: for the label, for the sentence behind either, in another order."""
    of, room = config.eval, config.model.context_length
    return Work(4 * of.num_sentences * sum(
        (of.draws if shots else 1) * min(room, (shots + 1) * SENTENCE_TOKENS)
        for shots in of.shots))


def _sampled_work(config: PipelineConfig) -> Work:
    """The samples, which the verifier then reads."""
    of = config.eval
    return _written(config, of.sampled_problems, of.samples_per_problem) + Work(
        of.sampled_problems * of.samples_per_problem * of.max_new_tokens)


_BY = "modern_llm.evaluation.measuring:"
FAMILIES: dict[str, TaskFamily] = {family.name: family for family in (
    TaskFamily("perplexity", _BY + "perplexity", _BY + "perplexity_items",
               lambda *_: "held-out documents, each token once, packed rows",
               headline=("perplexity, ",), panels=("bits per byte",), less_is_better=True,
               # another tokenizer's rows are other rows; the protocols compare
               put_to="stages",
               work=lambda of: Work(len(of.data.sources) * min(
                   of.eval.max_perplexity_tokens, of.data.max_validation_tokens))),
    TaskFamily("protocols", _BY + "protocols", _BY + "protocols_items",
               lambda *_: "each token once, as the protocol says",
               headline=("perplexity T1, ", "word perplexity T3, "), panels=(),
               aside="nats per token T", section=True, less_is_better=True,
               rows=_BY + "protocols_rows",
               # T1 and T3 read a token once, T2 twice
               work=lambda of: Work(4 * len(protocol_sources(of)) * of.eval.protocol_tokens)),
    TaskFamily("sentiment", _BY + "sentiment", _BY + "sentiment_items",
               _BY + "sentiment_protocol", headline=("accuracy",), compared="accuracy",
               chance="majority class", aside="-shot, |^majority class",
               texts=lambda of: [r.text for r in of.reviews],
               rows=_BY + "sentiment_rows", answers=_BY + "sentiment_answers",
               data="eval.sentiment", work=_sentiment_work),
    TaskFamily("sentiment, asked", _BY + "asked", _BY + "asked_items", _BY + "asked_protocol",
               headline=("accuracy",), chance="majority class", aside="^majority class",
               rows=_BY + "asked_rows", answers=_BY + "asked_answers", data="eval.sentiment",
               work=lambda of: Work(2 * of.eval.num_sentences * 2 * SENTENCE_TOKENS)),
    TaskFamily("problems", _BY + "problems", _BY + "problems_items", _BY + "problems_protocol",
               seeded=True, headline=("exact match",), compared="exact match",
               aside="^error, |, level ", answers=_BY + "problems_answers", data="eval.problems",
               texts=lambda of: [p.question for p in of.problems],
               work=lambda of: _written(of, of.eval.num_problems)),
    TaskFamily("problems, calculator", _BY + "calculated", _BY + "calculated_items",
               _BY + "calculated_protocol", seeded=True, headline=("exact match",),
               aside="^error, |, level ", answers=_BY + "problems_answers", data="eval.problems",
               work=lambda of: _written(of, of.eval.num_problems)),
    TaskFamily(SAMPLED, _BY + "samples", _BY + "samples_items", _BY + "samples_protocol",
               seeded=True, headline=("exact match", "pass@all", "majority@all"),
               panels=("majority@", "weighted_vote@"), aside=", level ", put_to="last",
               answers=_BY + "samples_answers", data="eval.problems", work=_sampled_work),
    TaskFamily("instructions", _BY + "instructions", _BY + "instructions_items",
               lambda of, stage, asked, _: f"built-in, greedy, {asked}, the whole answer",
               headline=("exact match", "exact match, new phrasings"),
               answers=_BY + "instructions_answers",
               texts=lambda of: [f"{i.instruction}\n{i.input}" for i in of.instructions],
               # in phrasings of the training, and in new ones
               work=lambda of: _written(of, 2 * of.eval.num_instructions * has_instructions(of),
                                        longest=INSTRUCTION_TOKENS)),
    TaskFamily("preferences", _BY + "preferences", _BY + "preferences_items",
               _BY + "preferences_protocol", headline=("accuracy",), compared="accuracy",
               chance=0.5, aside="longer answer$", rows=_BY + "preferences_rows",
               answers=_BY + "preferences_answers", data="dpo.sources",
               texts=lambda of: [p.request for p in of.pairs],
               work=lambda of: Work(2 * of.eval.num_pairs * of.model.context_length)),
)}


def evaluation_work(config: PipelineConfig) -> Work:
    """What the tasks take together, models from elsewhere being as large as the run's own; the
    overlap with the training text, which takes no model, is not in it.
    """
    own = sum(STAGES[name].makes_generator and is_part_of_all(name, config)
              for name in STAGES["eval"].judges)
    models = {"all": own + len(config.eval.baselines), "stages": own, "last": 1}
    return sum((family.work(config) * models[family.put_to] for family in FAMILIES.values()
                if family.work), Work())


def register_family(family: TaskFamily) -> TaskFamily:
    """Add a task from outside, for this process. ValueError if there is one of that name."""
    if not family.name or family.name in FAMILIES or family.name == "cost":
        raise ValueError(f"register_family: the name {family.name!r} is taken; call the task "
                         "otherwise")
    FAMILIES[family.name] = family
    return family


def is_aside(ledger: pd.DataFrame) -> pd.Series:
    """Which rows (task, metric) are parts or kinds of another measure, by `TaskFamily.aside`."""
    aside = pd.Series(False, index=ledger.index)
    for family in FAMILIES.values():
        if family.aside:
            aside |= ledger.task.eq(family.name) & ledger.metric.str.contains(family.aside)
    return aside
