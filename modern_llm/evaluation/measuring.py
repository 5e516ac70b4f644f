"""What is measured of every model: the items of all tasks, and the functions that their entries in
`families` name: a model put to each, the items of what it did, further rows, the protocol in words,
what a reader of the items is shown.

A plain module: how the measuring itself is checked is chapters 46 and 47.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from tokenizers import Tokenizer

from modern_llm.config import EvalConfig, PipelineConfig
from modern_llm.data import synth
from modern_llm.data.corpus import build_token_cache
from modern_llm.data.packing import TokenCache
from modern_llm.data.pairs import Pair, encode_pair, preference_pairs
from modern_llm.data.tasks import RERANKERS, Problem, Review, sentences, word_problems
from modern_llm.evaluation.asking import Subject
from modern_llm.evaluation.families import (
    INSTRUCTION_TOKENS, SAMPLED, has_instructions, protocol_sources,
)
from modern_llm.evaluation.held_out import scored_split
from modern_llm.evaluation.ledger import item_rows
from modern_llm.evaluation.pieces import (
    asked_piece, document_pair, perplexity_piece, preference_piece, protocol_measures,
    protocol_piece, sentiment_piece,
)
from modern_llm.evaluation.reranking import sample_items
from modern_llm.evaluation.sentiment_tables import accuracy_rows
from modern_llm.evaluation.written import instruction_piece, problem_items, problem_piece
from modern_llm.statistics import mean_interval, paired_difference, proportion_interval
from modern_llm.training.sft import SENTIMENT_REQUEST

PAIR_LETTERS = 200  # of each text of a pair that a reader is shown


def held_out_split(source: str) -> str:
    """The split that a source is judged on: "test" where there is one."""
    return "test" if source == "synthetic" else scored_split(source)


def named(source: str) -> str:
    """A source in words, with its split where that is not the test split."""
    return source + " (validation split)" * (held_out_split(source) != "test")


@dataclass(frozen=True)
class EvaluationItems:
    """What every model is asked, all of it held out, and the solved examples shown before it."""

    config: PipelineConfig
    problems: list[Problem]
    solved: list[Problem]
    sampled: list[int]  # places in `problems` of those that are sampled from
    reviews: list[Review]
    demonstrations: list[Review]
    instructions: list
    shown: list  # solved instructions
    pairs: list[Pair]
    texts: list[str]  # sources of the four protocols
    caches: dict[str, TokenCache]

    @property
    def settings(self) -> EvalConfig:
        """What is measured, on how many items."""
        return self.config.eval

    @property
    def sizes(self) -> list[int]:
        """Numbers of samples to choose among; the last is all that the settings allow."""
        return [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= self.settings.samples_per_problem]

    @property
    def counts(self) -> dict[str, int]:
        """How many items there are."""
        return {"problems": len(self.problems), "sampled from": len(self.sampled),
                "reviews": len(self.reviews), "instructions": len(self.instructions),
                "pairs": len(self.pairs)}


def evaluation_items(config: PipelineConfig, tokenizer: Tokenizer) -> EvaluationItems:
    """The items of the settings. Problems and pairs that came without a test split are those of the
    validation split.
    """
    settings, seed, world_seed = config.eval, config.seed, config.data.world_seed
    levels = dict(levels=settings.levels, seed=seed)
    problems = word_problems(settings.problems, held_out_split(settings.problems),
                             settings.num_problems, **levels)
    sampled = [i for i, p in enumerate(problems) if settings.problems != "synthetic"
               or p.level in settings.sampled_levels][:settings.sampled_problems]
    requests = lambda split, n, phrasings="trained": list(itertools.islice(
        synth.instructions(split, 7, world_seed, phrasings=phrasings), n))
    asked = settings.num_instructions * has_instructions(config)
    each = math.ceil(settings.num_pairs / len(config.dpo.sources))
    pairs = [preference_pairs(source, held_out_split(source), each, world_seed=world_seed)[0]
             for source in config.dpo.sources]
    return EvaluationItems(
        config, problems, word_problems(settings.problems, "train", 200, **levels), sampled,
        sentences(settings.sentiment, "test", settings.num_sentences),
        sentences(settings.sentiment, "train", 400),
        requests("heldout", asked) + requests("heldout", asked, "new"),
        requests("train", 200),
        list(itertools.chain(*pairs)), protocol_sources(config),
        {name: build_token_cache(name, "validation", tokenizer, config.data.max_validation_tokens,
                                 world_seed=world_seed) for name in config.data.sources})


# ---- the tasks -----------------------------------------------------------------------------------


def told(item: Iterable[int], prompt: Iterable[str], expected: Iterable[str],
         answer: Iterable[str]) -> pd.DataFrame:
    """What a reader of the items is shown of each: what was asked, what is right, what was said."""
    return pd.DataFrame({"item": list(item), "prompt": list(prompt), "expected": list(expected),
                         "answer": list(answer)})


def perplexity(of: EvaluationItems, subject: Subject) -> pd.DataFrame:
    """Nats of the held-out documents, packed as in training."""
    rows = max(1, min(16, 16_384 // subject.model.cfg.context_length))
    return perplexity_piece(subject, of.caches, rows, of.config.data.isolate_documents,
                            of.settings.max_perplexity_tokens)


def perplexity_items(of: EvaluationItems, stage: str, table: pd.DataFrame) -> list[pd.DataFrame]:
    """Nats per token of each source, an item a document."""
    return [item_rows(stage, "perplexity", f"nats per token, {source}", scores.document,
                      scores.nats, weight=scores.tokens)
            for source, scores in table.groupby("source", sort=False)]


def protocols(of: EvaluationItems, subject: Subject) -> pd.DataFrame:
    """The tables of the four perplexity protocols."""
    return protocol_piece(subject, of.texts, of.settings.protocol_tokens, of.config.data.world_seed)


def protocols_items(of: EvaluationItems, stage: str, table: pd.DataFrame) -> list[pd.DataFrame]:
    """Nats per token of each source in the protocols that count by token."""
    per_token = table[table.protocol != "T3"]
    return [item_rows(stage, "protocols", f"nats per token {protocol}, {source}", scores.document,
                      scores.nats, weight=scores.tokens)
            for (source, protocol), scores in per_token.groupby(["source", "protocol"], sort=False)]


def protocols_rows(of: EvaluationItems, stage: str, table: pd.DataFrame) -> list[dict]:
    """Perplexities of every source and protocol."""
    return protocol_measures(stage, table)


def sentiment(of: EvaluationItems, subject: Subject) -> pd.DataFrame:
    """What is said of each review, with each number of demonstrations."""
    return sentiment_piece(subject, of.reviews, of.demonstrations, of.settings.shots,
                           of.settings.draws, of.config.seed, orders=4)


def sentiment_items(of: EvaluationItems, stage: str, table: pd.DataFrame) -> list[pd.DataFrame]:
    """Accuracy at the most demonstrations, an item a review, the mean of its draws."""
    asked = _most_shots(of, table)
    right = (asked.said == asked.label).groupby(asked.item).mean()
    return [item_rows(stage, "sentiment", "accuracy", right.index, right)]


def _most_shots(of: EvaluationItems, table: pd.DataFrame) -> pd.DataFrame:
    return table[(table.shots == of.settings.shots[-1])
                 & (table.method == "direct") & (table.said != "")]


def sentiment_answers(of: EvaluationItems, stage: str, table: pd.DataFrame) -> pd.DataFrame:
    """What was said of each review in each draw."""
    said = _most_shots(of, table).groupby("item").said.agg(", ".join)
    reviews = [of.reviews[i] for i in said.index]
    return told(said.index, [r.text for r in reviews], [r.label for r in reviews], said)


def sentiment_rows(of: EvaluationItems, stage: str, table: pd.DataFrame) -> list[dict]:
    """Accuracy by demonstrations and method."""
    return [{"stage": stage, "task": "sentiment", **row,
             "protocol": f"{of.settings.sentiment}; {row['protocol']}"}
            for row in accuracy_rows(table)]


def sentiment_protocol(of: EvaluationItems, stage: str, asked: str, generator: str) -> str:
    """How sentiment was measured."""
    return (f"{of.settings.sentiment}, {of.settings.shots[-1]} demonstrations, mean of "
            f"{of.settings.draws} draws, likelier label word behind 'Sentiment:'")


def asked(of: EvaluationItems, subject: Subject) -> pd.DataFrame:
    """What is said of each review when it is asked about as in SFT."""
    return asked_piece(subject, of.reviews, SENTIMENT_REQUEST)


def asked_items(of: EvaluationItems, stage: str, table: pd.DataFrame) -> list[pd.DataFrame]:
    """Accuracy, an item a review."""
    return [item_rows(stage, "sentiment, asked", "accuracy", table.item,
                      table.said == table.label)]


def asked_answers(of: EvaluationItems, stage: str, table: pd.DataFrame) -> pd.DataFrame:
    """What was said of each review."""
    return told(table.item, [of.reviews[i].text for i in table.item], table.label, table.said)


def asked_rows(of: EvaluationItems, stage: str, table: pd.DataFrame) -> list[dict]:
    """What always giving the commonest label would have reached."""
    label, count = next(iter(table.label.value_counts().items()))
    return [{"stage": stage, "task": "sentiment, asked", "metric": "majority class",
             **proportion_interval(count, len(table)), "protocol": f"always {label!r}"}]


def asked_protocol(of: EvaluationItems, stage: str, how: str, generator: str) -> str:
    """How it was asked."""
    how = how.replace(" behind solved examples, as far as they fit", ", no examples")
    return (f"{of.settings.sentiment}, {SENTIMENT_REQUEST!r}, {how}, likelier label word as the "
            "answer")


def written_options(of: EvaluationItems) -> dict:
    """How long an answer may be, what is shown before it, and how many at once."""
    return dict(max_new_tokens=of.settings.max_new_tokens, shots=of.settings.problem_shots,
                batch_rows=of.settings.batch_rows)


def problems(of: EvaluationItems, subject: Subject, calculator: bool = False) -> pd.DataFrame:
    """Greedy answers to the problems."""
    return problem_piece(subject, of.problems, of.solved, calculator=calculator,
                         **written_options(of))


def problems_items(of: EvaluationItems, stage: str, table: pd.DataFrame) -> list[pd.DataFrame]:
    """Exact match by level, flexible match, ending and kinds of errors."""
    return [problem_items(stage, "problems", table)]


def problems_answers(of: EvaluationItems, stage: str, table: pd.DataFrame) -> pd.DataFrame:
    """What was written of each problem."""
    asked = [of.problems[i] for i in table.problem]
    return told(table.problem, [p.question for p in asked], [p.answer for p in asked], table.text)


def problems_protocol(of: EvaluationItems, stage: str, asked: str, generator: str) -> str:
    """How problems were measured."""
    return f"{named(of.settings.problems)}, greedy, {asked}, the number behind ####"


def calculated(of: EvaluationItems, subject: Subject) -> pd.DataFrame:
    """Greedy answers to the problems with a calculator."""
    return problems(of, subject, calculator=True)


def calculated_items(of: EvaluationItems, stage: str, table: pd.DataFrame) -> list[pd.DataFrame]:
    """As `problems_items`."""
    return [problem_items(stage, "problems, calculator", table)]


def calculated_protocol(of: EvaluationItems, stage: str, asked: str, generator: str) -> str:
    """How problems were measured with a calculator."""
    return (f"{named(of.settings.problems)}, greedy with a calculator, {asked}, the number behind "
            "####")


def samples(of: EvaluationItems, subject: Subject) -> pd.DataFrame:
    """Several answers to each sampled problem."""
    found = problem_piece(subject, [of.problems[i] for i in of.sampled], of.solved,
                          samples=of.settings.samples_per_problem,
                          temperature=of.settings.temperature, seed=of.config.seed + 1,
                          **written_options(of))
    return found.assign(problem=np.array(of.sampled)[found.problem])


def samples_items(of: EvaluationItems, stage: str, table: pd.DataFrame) -> list[pd.DataFrame]:
    """Each problem's chance of being right by every way to choose among its samples."""
    if "score" in table:  # the verifier's
        voted = sample_items(stage, SAMPLED, table, of.sizes, ["best_of_n", "weighted_vote"])
        all_of_them = voted[voted.metric == f"weighted_vote@{of.sizes[-1]}"]
        return [all_of_them.assign(metric="exact match"), voted]
    plain = [method for method in RERANKERS if method not in ("best_of_n", "weighted_vote")]
    return [sample_items(stage, SAMPLED, table, of.sizes, [*plain, "pass"])]


def samples_answers(of: EvaluationItems, stage: str, table: pd.DataFrame) -> pd.DataFrame:
    """All samples of each problem; of the verifier, the score it gave each."""
    says = [f"[{row.sample + 1}] {'right' if row.right else 'wrong'}"
            + (f", score {row.score:.3f}" if "score" in table else f": {row.text}")
            for row in table.itertuples()]
    joined = pd.Series(says).groupby(table.problem.to_numpy()).agg("\n".join)
    asked = [of.problems[i] for i in joined.index]
    return told(joined.index, [p.question for p in asked], [p.answer for p in asked], joined)


def instructions(of: EvaluationItems, subject: Subject) -> pd.DataFrame:
    """Greedy answers to built-in instructions."""
    return instruction_piece(subject, of.instructions, of.shown, INSTRUCTION_TOKENS,
                             batch_rows=of.settings.batch_rows)


def instructions_items(of: EvaluationItems, stage: str, table: pd.DataFrame) -> list[pd.DataFrame]:
    """Exact match by kind of instruction, in phrasings of the training and in new ones, and ending.
    """
    new = pd.Series([item.new for item in of.instructions], table.index)
    return [*(item_rows(stage, "instructions", metric, part.item, part.right, part.kind)
              for metric, part in (("exact match", table[~new]),
                                   ("exact match, new phrasings", table[new])) if len(part)),
            item_rows(stage, "instructions", "ended", table.item, table.ended)]


def instructions_answers(of: EvaluationItems, stage: str, table: pd.DataFrame) -> pd.DataFrame:
    """What was answered to each instruction."""
    asked = [of.instructions[i] for i in table.item]
    return told(table.item, [i.request for i in asked], [i.output for i in asked], table.text)


def preferences(of: EvaluationItems, subject: Subject) -> pd.DataFrame:
    """In the form that the model knows; in a chat, pairs that do not fit the context are left out.
    """
    tokenizer, room = subject.tokenizer, subject.model.cfg.context_length
    if subject.chat:
        found = {i: encode_pair(tokenizer, p, room)[0] for i, p in enumerate(of.pairs)}
        pairs = {i: (p.chosen, p.rejected) for i, p in found.items() if p is not None}
    else:
        pairs = {i: document_pair(tokenizer, p.request, (p.chosen, p.rejected), room)
                 for i, p in enumerate(of.pairs)}
    # numbered as in the data, so that stages of either kind are compared on the same pairs
    return preference_piece(subject, list(pairs.values())).assign(item=list(pairs))


def preferences_items(of: EvaluationItems, stage: str, table: pd.DataFrame) -> list[pd.DataFrame]:
    """Whether the preferred answer is likelier."""
    return [item_rows(stage, "preferences", "accuracy", table.item, table.right)]


def preferences_rows(of: EvaluationItems, stage: str, table: pd.DataFrame) -> list[dict]:
    """What length alone would have reached on the same pairs: always the answer with more letters;
    of equally long ones half.
    """
    more = [len(of.pairs[i].chosen) - len(of.pairs[i].rejected) for i in table.item]
    right = (np.sign(more) + 1) / 2
    control = {"stage": stage, "task": "preferences"}
    return [{**control, "metric": "the longer answer", **mean_interval(right),
             "protocol": "always the answer with more letters, no model"},
            {**control, "metric": "accuracy minus the longer answer",
             **paired_difference(table.right, right), "protocol": "paired by pair"}]


def preferences_answers(of: EvaluationItems, stage: str, table: pd.DataFrame) -> pd.DataFrame:
    """The last message and the beginnings of both answers, and how likely each is, in nats."""
    pairs, begin = [of.pairs[i] for i in table.item], lambda text: text[:PAIR_LETTERS] + (
        " […]" if len(text) > PAIR_LETTERS else "")
    return told(table.item, [begin(p.prompt[-1]["content"]) for p in pairs],
                [f"chosen: {begin(p.chosen)}\nrejected: {begin(p.rejected)}" for p in pairs],
                [f"log p {row.chosen:.1f} chosen, {row.rejected:.1f} rejected"
                 for row in table.itertuples()])


def samples_protocol(of: EvaluationItems, stage: str, asked: str, generator: str) -> str:
    """How samples were drawn and chosen from."""
    settings = of.settings
    levels = (f" of levels {', '.join(map(str, settings.sampled_levels))}"
              if settings.problems == "synthetic" else "")
    drawn = (f"{of.sizes[-1]} samples per problem{levels} at temperature "
             f"{settings.temperature:g}")
    if not asked:  # the samples of another one, scored
        return (f"{drawn} from {generator}, chosen with the verifier's scores; exact match is the "
                "weighted vote among all of them")
    return f"{drawn}; exact match is the greedy answer to the same problems"


def preferences_protocol(of: EvaluationItems, stage: str, asked: str, generator: str) -> str:
    """How preferences were measured."""
    return (f"{', '.join(map(named, of.config.dpo.sources))}, held-out pairs, log "
            "p(chosen) > log p(rejected), "
            + ("chat template" if asked.startswith("chat") else "document"))
