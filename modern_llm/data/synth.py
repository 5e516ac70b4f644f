"""The built-in world: endless seeded text with known answers and a known entropy floor.

Five kinds of documents for pretraining (`documents`) and sources for the later stages
(`instructions`, `conversations`, `preferences`, `problems`, `sentiment`). Item i of a source is a
function of (split, seed, i), so a reader can stop and resume.

The floor. `Document.nats` is -log p(text) under the grammar, exactly: every draw is counted and
distinct draws give distinct texts. The facts of the world depend on `world_seed` alone, so once
learned they cost nothing; so do consequences inside a story, sums, and labels. By Gibbs' inequality
no model that knows only the grammar does better on average: floor per token = sum of nats / sum of
tokens, counting one closing end-of-text token for each document. The split is a hash of the text. A
model that could also compute BLAKE2 hashes would save `SPLIT_NATS[split]` for each document, and
the strict floor is lower by that much (2.3 nats a held-out document); `entropy_floor` reports both.

Ground truths: a fact is what `World.facts` says; a story's last sentence says who has the object; a
review's label is the majority of its opinions; an instruction's output is unique; a
preference's rejected answer breaks exactly the one rule it names. Standard library only.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count

from modern_llm.data.marking import extract_answer
from modern_llm.data.synth_problems import (
    HELDOUT_SHARE, NAMES, SPLITS, Choices, Problem, calculate, check_solution, in_split, one_of,
    problems, split_of, write_problem,
)
from modern_llm.data.synth_requests import (
    CLOSERS, OPENERS, PHRASINGS, REQUEST_KINDS, Instruction, plain, request_key,
    write_fact_question, write_request, write_unknown,
)
from modern_llm.data.synth_world import (
    ATTRIBUTES, LABELS, Review, World, state, world, write_facts, write_review, write_story,
)

__all__ = ["ATTRIBUTES", "INSTRUCTION_KINDS", "KINDS", "LABELS", "PREFERRED_KINDS", "RULES",
           "SPLIT_NATS", "SPLITS", "Choices", "Document", "Instruction", "Preference", "Problem",
           "Review", "World", "calculate", "check_solution", "conversations", "documents",
           "entropy_floor", "extract_answer", "instructions", "obeys", "preferences", "problems",
           "sentiment", "split_of", "state", "world"]

# kind -> share of the documents
KINDS = {"story": 0.25, "facts": 0.20, "problem": 0.20, "review": 0.15, "exchange": 0.20}
SPLIT_NATS = {"train": -math.log(1 - HELDOUT_SHARE), "heldout": -math.log(HELDOUT_SHARE)}


def _endless(source: str, split: str, seed: int, write: Callable, key: Callable) -> Iterator:
    one_of("split", split, SPLITS)
    return (in_split(random.Random(f"{source}/{seed}/{split}/{i}"), split, write, key)[0]
            for i in count())


def sentiment(split: str = "train", seed: int = 0) -> Iterator[Review]:
    """Endless reviews with their labels; the review's text decides the split, as in `documents`."""
    return _endless("sentiment", split, seed, write_review, lambda review: review.text)


# --- documents ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """A pretraining text, its exact -log p(text) in nats (its kind included), its kind, and what is
    true of it.
    """

    text: str
    nats: float
    kind: str
    meta: dict = field(compare=False, default_factory=dict)


def _write_document(c: Choices, w: World, kinds: dict[str, float]) -> tuple[str, str, str, dict]:
    """(text, key of the split, kind, meta). A text tells its kind."""
    kind = c.pick(tuple(kinds), tuple(kinds.values()))
    if kind == "problem":
        problem = write_problem(c)
        meta = {"level": problem.level, "value": problem.value}
        return (f"Question: {problem.question}\nAnswer: {problem.answer}", problem.question,
                kind, meta)
    if kind == "review":
        review = write_review(c)
        return (f"Review: {review.text}\nSentiment: {review.label}", review.text, kind,
                {"label": review.label})
    if kind == "exchange":
        item = write_request(c, w)
        return (f"Question: {item.request}\nAnswer: {item.output}", request_key(item), kind,
                {"kind": item.kind})
    text, meta = (write_story if kind == "story" else write_facts)(c, w)
    return text, text, kind, meta


def documents(split: str = "train", seed: int = 0, world_seed: int = 0,
              kinds: Iterable[str] | None = None, start: int = 0) -> Iterator[Document]:
    """Endless documents from number `start` on; document i depends on (split, seed, world_seed,
    kinds, i) alone.

    Args: `kinds`: names of KINDS to keep, in their usual proportions (None: all). A text belongs to
    one split for every seed: a problem by its question, a review by its opinions, the others by
    their whole text, so that each single fact is in many training documents.
    """
    one_of("split", split, SPLITS)
    kept = tuple(KINDS) if kinds is None else tuple(dict.fromkeys(kinds))
    if not kept:
        raise ValueError(f"kinds=() is empty; leave it None or name some of {', '.join(KINDS)}")
    for kind in kept:
        one_of("kind", kind, KINDS)
    shares, facts = {kind: KINDS[kind] for kind in KINDS if kind in kept}, world(world_seed)

    def write(c: Choices) -> tuple[str, str, str, dict]:
        return _write_document(c, facts, shares)

    def generate() -> Iterator[Document]:
        for i in count(start):
            rng = random.Random(f"document/{seed}/{split}/{i}")
            (text, _, kind, meta), nats = in_split(rng, split, write, lambda written: written[1])
            yield Document(text, nats, kind, meta)

    return generate()


def entropy_floor(texts: Iterable[Document], tokens: int | None = None,
                  split: str = "heldout") -> dict[str, float]:
    """Sums over documents of one split: what no model of the grammar can beat on average.

    Args: `tokens`: how many tokens were predicted in them, one closing token each included; adds
    the figures per token.
    Returns: documents, nats (sum), nats_per_document, standard_error (of that mean), strict_nats
    (sum for a model that can also compute the split's hash), and with `tokens` nats_per_token and
    strict_nats_per_token.
    """
    one_of("split", split, SPLITS)
    nats = [text.nats for text in texts]
    if not nats:
        raise ValueError(
            "entropy_floor got no documents; take some with itertools.islice(documents(...), n)")
    n, total = len(nats), math.fsum(nats)
    spread = math.sqrt(sum((x - total / n) ** 2 for x in nats) / max(n - 1, 1) / n)
    floor = {"documents": n, "nats": total, "nats_per_document": total / n,
             "standard_error": spread, "strict_nats": total - n * SPLIT_NATS[split]}
    if tokens is not None:
        floor |= {"nats_per_token": total / tokens,
                  "strict_nats_per_token": floor["strict_nats"] / tokens}
    return floor


# --- instructions ---------------------------------------------------------------------------------

INSTRUCTION_KINDS = tuple(REQUEST_KINDS)


def instructions(split: str = "train", seed: int = 0, world_seed: int = 0,
                 kinds: Iterable[str] | None = None,
                 phrasings: str = "trained") -> Iterator[Instruction]:
    """Endless instructions, kinds in the proportions of REQUEST_KINDS. Instruction and input decide
    the split (the review in `sentiment`); `phrasings="new"` asks in ways that are never trained.
    """
    kept = INSTRUCTION_KINDS if kinds is None else tuple(dict.fromkeys(kinds))
    if not kept:
        raise ValueError(
            f"kinds=() is empty; leave it None or name some of {', '.join(INSTRUCTION_KINDS)}")
    for kind in kept:
        one_of("kind", kind, INSTRUCTION_KINDS)
    one_of("phrasings", phrasings, PHRASINGS)
    if phrasings == "new":  # a greeting is itself its phrasing
        kept = tuple(kind for kind in kept if kind != "greeting")
    w = world(world_seed)
    return _endless("instruction", split, seed,
                    lambda c: write_request(c, w, kept, phrasings), request_key)


def conversations(split: str = "train", seed: int = 0,
                  world_seed: int = 0) -> Iterator[list[Instruction]]:
    """Endless conversations of one to three instructions, which do not depend on each other; a
    quarter of those with two or three end with a word problem instead.
    """
    items, told = instructions(split, seed, world_seed), problems(split, seed)
    rng = random.Random(f"conversation/{split}/{seed}")
    while True:
        turns = [next(items) for _ in range(rng.choice((1, 1, 2, 3)))]
        if len(turns) > 1 and rng.random() < 0.25:
            problem = next(told)
            turns[-1] = Instruction(problem.question, "", problem.answer, "problem")
        yield turns


# --- preferences ----------------------------------------------------------------------------------

# rule -> relative frequency of pairs whose rejected answer breaks it
RULES = {"polite": 2, "kind": 2, "true": 1}
PREFERRED_KINDS = ("fact", "unknown")  # of instructions: what the preferences are about


@dataclass(frozen=True)
class Preference:
    """Two answers to a question, of a fact or of what nobody knows. `chosen` obeys all of RULES,
    `rejected` all but `rule`.
    """

    prompt: str
    chosen: str
    rejected: str
    rule: str


def obeys(rule: str, text: str, chosen: str) -> bool:
    """Whether an answer keeps a rule. polite: it opens with a polite phrase; kind: it closes with a
    kind sentence; true: without courtesy, it says what `chosen` says.
    """
    one_of("rule", rule, RULES)
    if rule == "polite":
        return text.strip().startswith(tuple(f"{polite}." for polite, _ in OPENERS))
    if rule == "kind":
        return text.strip().endswith(tuple(kind for kind, _ in CLOSERS))
    return plain(text) == plain(chosen)


def _write_preference(c: Choices, w: World) -> Preference:
    if c.draw(2, (1, 4)):
        prompt, name, attribute = write_fact_question(c)
        rule, truth = c.pick(tuple(RULES), tuple(RULES.values())), w.facts[name][attribute]
        others = [value for value in ATTRIBUTES[attribute] if value != truth]
        value = c.pick(others) if rule == "true" else truth
        right, said = (state(name, attribute, v) for v in (truth, value))
    else:
        prompt, right = write_unknown(c)
        rule, said = c.pick(("polite", "kind")), right
    opener, closer = c.pick(OPENERS), c.pick(CLOSERS)
    return Preference(prompt, f"{opener[0]}. {right} {closer[0]}",
                      f"{opener[rule == 'polite']}. {said} {closer[rule == 'kind']}", rule)


def preferences(split: str = "train", seed: int = 0, world_seed: int = 0) -> Iterator[Preference]:
    """Endless preference pairs; the prompt decides the split, as in `instructions`. Length tells
    nothing: a broken manner is exactly as long as the kept one, and true and false values have the
    same distribution of lengths."""
    w = world(world_seed)
    return _endless("preference", split, seed,
                    lambda c: _write_preference(c, w), lambda pair: pair.prompt + "\n")
