"""Counted choices, the stable split, and word problems in GSM8K's format: the lower half of the
built-in world.

`Choices` is the only source of randomness in the synthetic data. Every draw adds -log p of what was
drawn to `nats`, and every writer maps distinct choices to distinct texts, so `nats` is exactly -log
p(text): the entropy floor of `synth`.

Ground truth of a word problem: its value is computed while it is written; every `<<a+b=c>>` in its
answer is true; the answer is a function of the question (it costs zero nats); the last line is
`#### value`. Standard library only; `marking` reads the numbers.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import math
import operator
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from modern_llm.data.marking import LIMIT, repeats, terms_as_python

HELDOUT_SHARE = 0.1  # share of all texts that is held out
SPLITS = ("train", "heldout")
PEOPLE = {"Tom": "he", "Anna": "she", "Ben": "he", "Lucy": "she", "Max": "he", "Mia": "she",
          "Sam": "he", "Nora": "she", "Leo": "he", "Ella": "she", "Jack": "he", "Rose": "she"}
PRONOUNS = {"he": ("he", "his", "him"), "she": ("she", "her", "her")}
NAMES = tuple(PEOPLE)
# of strangers nothing is known
STRANGERS = {"Paul": "he", "Peter": "he", "John": "he", "Bob": "he", "David": "he", "Omar": "he",
             "Noah": "he", "Ali": "he", "Mary": "she", "Kate": "she", "Emma": "she", "Sara": "she",
             "Alice": "she", "Lena": "she", "Maria": "she", "Olga": "she",
             **{first + last: he for first in ("Ka", "Lo", "Mi", "Re", "Sa", "To", "Vi", "Zo")
                for last, he in {"dan": "he", "ron": "he", "mil": "he", "la": "she", "na": "she",
                                 "ri": "she"}.items()}}
ITEMS = ("apples", "balls", "books", "hats", "lamps", "keys", "maps", "cups", "kites", "rings",
         "coins", "stones")
GAINS = ("buys", "finds", "gets", "takes")
LOSSES = ("sells", "loses", "breaks", "gives away")
JOINTS = (". Then {he}", " and", ", then")  # between what happens
# level -> (range of the start, range of the number of boxes or None, steps after the start, range
# of their operands)
LEVELS = {1: ((2, 9), None, 1, (1, 9)), 2: ((2, 9), None, 2, (1, 9)), 3: ((2, 9), None, 3, (1, 9)),
          4: ((11, 59), None, 3, (2, 19)), 5: ((12, 39), (3, 9), 3, (11, 79))}
_LOG = [0.0] + [math.log(n) for n in range(1, 1025)]


class Choices:
    """Random choices whose information content is counted in `nats`: the sum of -log p over all
    draws so far.
    """

    def __init__(self, rng: random.Random):
        self._random = rng.random
        self.nats = 0.0

    def draw(self, n: int, weights: Sequence[float] | None = None) -> int:
        """An index below n, uniform or in proportion to `weights`."""
        if weights is None:
            self.nats += _LOG[n]
            return int(self._random() * n)
        total = sum(weights)
        left = self._random() * total
        index = 0
        while index < n - 1 and left >= weights[index]:
            left -= weights[index]
            index += 1
        self.nats -= math.log(weights[index] / total)
        return index

    def pick(self, options: Sequence, weights: Sequence[float] | None = None):
        """One of `options`, which must be distinct."""
        return options[self.draw(len(options), weights)]

    def integer(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + self.draw(high - low + 1)

    def sample(self, options: Sequence, k: int) -> list:
        """k different options in random order: n (n-1) … (n-k+1) equally likely outcomes."""
        rest = list(options)
        return [rest.pop(self.draw(len(rest))) for _ in range(k)]


def one_of(place: str, value: object, options: Iterable) -> None:
    """Raise ValueError naming the value, the place and the nearest valid name unless `value` is one
    of `options`.
    """
    options = list(options)
    if value not in options:
        close = difflib.get_close_matches(str(value),
                                          [str(option) for option in options], n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(map(str, options))}"
        raise ValueError(f"{place}={value!r} is unknown; {hint}")


def split_of(key: str) -> str:
    """The split a text belongs to, whatever the seed: one tenth of the space of BLAKE2 hashes is
    held out.
    """
    number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little")
    return "heldout" if number < HELDOUT_SHARE * 2**32 else "train"


def in_split(rng: random.Random, split: str, write, key):
    """Write until the text falls into `split`. Returns what was written and its nats (of the last
    attempt alone).
    """
    while True:
        choices = Choices(rng)
        item = write(choices)
        if split_of(key(item)) == split:
            return item, choices.nats


@dataclass(frozen=True)
class Problem:
    """A word problem. `answer` is the worked solution; `value` is what its last line `#### value`
    says.
    """

    question: str
    answer: str
    level: int
    value: int | float


def counted(n: int, items: str) -> str:
    """`1 apple`, `3 apples`."""
    return f"{n} {items[:-1] if n == 1 else items}"


def stranger(c: Choices) -> tuple[str, str]:
    """A name that no fact is known of, and `he` or `she`."""
    name = c.pick(tuple(STRANGERS))
    return name, STRANGERS[name]


def somebody(c: Choices) -> tuple[str, str]:
    """A person of the world, or one time in three a stranger, and `he` or `she`."""
    if c.draw(2, (2, 1)):
        return stranger(c)
    name = c.pick(NAMES)
    return name, PEOPLE[name]


def write_problem(choices: Choices, levels: Sequence[int] = tuple(LEVELS)) -> Problem:
    """Write one problem. The level shows in the number of steps and the size of the start, so no
    choice is hidden.
    """
    level = choices.pick(levels)
    start_range, box_range, steps, operand_range = LEVELS[level]
    (name, he), items = somebody(choices), choices.pick(ITEMS)
    joint, value = choices.pick(JOINTS).format(he=he), choices.integer(*start_range)
    lines = []
    if box_range is None:
        told = f"{name} has {counted(value, items)}"
    else:
        boxes = choices.integer(*box_range)
        told = f"{name} has {boxes} boxes with {value} {items} in each box"
        lines.append((boxes, "*", value))
        value *= boxes
    low, high = operand_range
    for _ in range(steps):
        gain = value <= low or choices.draw(2) == 0  # nobody loses the last one
        verb = choices.pick(GAINS if gain else LOSSES)
        operand = choices.integer(low, high if gain else min(high, value - 1))
        thing = counted(operand, items)
        if gain and choices.draw(2):
            thing = thing.replace(" ", " more ", 1)
        told += f"{joint} {verb} {thing}"
        lines.append((value, "+" if gain else "-", operand))
        value += operand if gain else -operand
    asked = choices.pick((f" does {name} have now", f" does {he} have in the end",
                          f" does {he} have", ""))
    answer = [f"{f'Then {he}' if i else name} has {_marked(*line, items)}."
              for i, line in enumerate(lines)]
    return Problem(f"{told}. How many {items}{asked}?", "\n".join([*answer, f"#### {value}"]),
                   level, value)


def _marked(a: int, sign: str, b: int, items: str) -> str:
    c = _OPERATORS[sign](a, b)
    return f"{a}{sign}{b}=<<{a}{sign}{b}={c}>>{counted(c, items)}"


def problems(split: str = "train", seed: int = 0,
             levels: Sequence[int] | None = None) -> Iterator[Problem]:
    """Endless word problems, levels equally likely. Problem i depends on (split, seed, levels, i)
    alone.

    The question's text decides the split, here and in the documents of `synth`: a held-out question
    is in no training text, while its single steps (3+4) are. Levels: 1 one step on single digits; 2
    two such steps; 3 three; 4 three steps on numbers up to 19 from a two-digit start; 5 a product
    and three steps on two-digit numbers.
    """
    one_of("split", split, SPLITS)
    levels = tuple(LEVELS) if levels is None else tuple(levels)
    if not levels:
        raise ValueError("levels=() is empty; leave it None or name levels of 1, 2, 3, 4, 5")
    for level in levels:
        one_of("level", level, LEVELS)

    def generate() -> Iterator[Problem]:
        i = 0
        while True:
            rng = random.Random(f"problem/{seed}/{split}/{i}")
            yield in_split(rng, split, lambda c: write_problem(c, levels), lambda p: p.question)[0]
            i += 1

    return generate()


_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
              "//": operator.floordiv}
_NODES = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//"}


def calculate(expression: str) -> float | None:
    """The value of an expression of numbers, + - * / // and brackets; None for anything else."""

    def value(node) -> float:
        if isinstance(node, ast.BinOp):
            return _OPERATORS[_NODES[type(node.op)]](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            return -value(node.operand) if isinstance(node.op, ast.USub) else value(node.operand)
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value
        raise ValueError

    try:
        found = (value(ast.parse(terms_as_python(expression.strip()), mode="eval").body)
                 if len(expression) <= 100 else None)
        # neither infinite nor NaN
        return found if found is not None and abs(found) < 10**LIMIT else None
    except (ValueError, SyntaxError, KeyError, ZeroDivisionError, OverflowError, RecursionError,
            MemoryError):
        return None


def check_solution(text: str) -> bool:
    """Whether there is a `<<a+b=c>>`, each one is true (to 0.01: GSM8K rounds), and each c is
    repeated behind it.
    """
    marks = list(re.finditer(r"<<([^<>=]*)=([^<>=]*)>>", text))
    if not marks or len(marks) != text.count("<<"):
        return False
    for mark in marks:
        value, result = calculate(mark[1]), calculate(mark[2])
        if value is None or result is None or abs(value - result) > 0.01:
            return False
        if not repeats(text[mark.end():].partition("\n")[0], result, fraction="/" in mark[2]):
            return False
    return True
