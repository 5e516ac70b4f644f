"""What people say to the built-in world's model, and the one right answer: facts, lists, sums,
reviews, greetings, and questions that nobody can answer.

A request is an item (`3 plus 4`) in a phrasing (`How much is 3 plus 4?`), and phrasings are put
together from parts. About one phrasing in ten is *new*: no training text has it, though others have
each of its parts, so that a model which answers it has not merely learned sentences by heart.
Injective and counted as everything else here; standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product

from modern_llm.data.synth_problems import NAMES, Choices, calculate, split_of, stranger
from modern_llm.data.synth_world import (
    ATTRIBUTES, OBJECTS, PLACES, World, state, write_review,
)

# kind -> share of the requests
REQUEST_KINDS = {"fact": 3, "copy": 3, "reverse": 4, "count": 3, "arithmetic": 3, "sentiment": 3,
                 "unknown": 2, "greeting": 2}
PHRASINGS = ("trained", "new")
OPENINGS = ("", "Please tell me. ", "I have a question. ", "Can you help? ", "One more thing. ",
            "Hi. ")
QUESTIONS = {
    "home": ("Where does {n} live?", "Where is the home of {n}?", "What place does {n} live in?",
             "Where does {n} come from?"),
    "pet": ("What pet does {n} have?", "Who lives with {n}?", "What is the pet of {n}?",
            "Which animal does {n} have?"),
    "job": ("What is the job of {n}?", "What does {n} work as?", "What job does {n} have?",
            "What is the work of {n}?"),
    "colour": ("What colour does {n} like?", "What is the colour of {n}?",
               "What colour does {n} wear?", "Which colour does {n} like?"),
    "food": ("What does {n} eat?", "What is the food of {n}?", "What food does {n} like?",
             "Which food does {n} buy?"),
}
NOBODY_KNOWS = ("How old is {n}?", "When was {n} born?", "Why is {n} sad?", "Who likes {n}?",
                "What does {n} think?", "What is the name of the cat of {n}?")
SUMS = ("What is {a} {word} {b}?", "What is {a}{sign}{b}?", "How much is {a} {word} {b}?",
        "How much is {a}{sign}{b}?", "Compute {a}{sign}{b}.", "{a} {word} {b} is what?")
LISTS = ("these words", "this list", "the words", "these things")
VERBS = ("Say", "Repeat", "Copy", "Write")
# kind -> parts of a phrasing
PARTS = {
    "copy": (VERBS, (" ",), LISTS, ("", " again", " once more", " as they are"), (".",)),
    "reverse": (VERBS, (" ",), LISTS,
                (" backwards", " from last to first", " in reverse", " the other way round"),
                (".",)),
    "count": (("How many", "Tell me: how many", "Do you know how many"), (" words", " things"),
              (" are here?", " there are?", " are in this list?", " stand below?")),
    "sentiment": (("Is", "Tell me: is", "Do you know: is"),
                  (" this review", " this", " this opinion", " the review"),
                  (" positive or negative?", " negative or positive?")),
    "arithmetic": (OPENINGS, SUMS),
    **{attribute: (OPENINGS, questions) for attribute, questions in QUESTIONS.items()},
    "nobody knows": (OPENINGS, NOBODY_KNOWS),
}
HELLOS = ("Hello", "Hi", "Good morning", "Good evening", "Good day")
ASIDES = {"": "What can I do for you?", " How are you?": "I am fine, thank you.",
          " Who are you?": "I am a small language model.",
          " What are you?": "I am a small language model.",
          " What can you do?": "I answer small questions.", " Can you help?": "Yes. Please ask."}
FAREWELLS = {"Thank you": "You are welcome.", "Thanks": "You are welcome.", "Bye": "Goodbye!",
             "Goodbye": "Goodbye!", "Good night": "Good night!"}
MARKS = ("", ".", "!")


@dataclass(frozen=True)
class Instruction:
    """A request with one right output. `input` is "" where the request needs none."""

    instruction: str
    input: str
    output: str
    kind: str
    new: bool = False  # asked in a phrasing that is never trained

    @property
    def request(self) -> str:
        """What is said: the instruction, and the input in a line of its own."""
        return f"{self.instruction}\n{self.input}".rstrip("\n")

    def check(self, text: str) -> bool:
        """Whether `text` is the right output; case, outer blanks, a final full stop, and the
        courtesy around it do not matter.
        """
        return plain(text) == plain(self.output)


# pairs (kept, broken) of equal length: what preferences praise, and what they blame
OPENERS = (("Of course", "Not again"), ("My pleasure", "What a bore"), ("Good day", "Bad luck"))
CLOSERS = (("Have a nice day.", "Now let me rest."), ("Ask me any time.", "Do not ask more."),
           ("I like to help.", "I hate to help."))
_COURTESY = re.compile(
    rf"(?:(?:{'|'.join(word for pair in OPENERS for word in pair)})\. )?(.*?)"
    rf"(?: (?:{'|'.join(map(re.escape, (word for pair in CLOSERS for word in pair)))}))?", re.S)


def plain(answer: str) -> str:
    """What an answer says, without courtesy, in small letters and without its full stop."""
    return _COURTESY.fullmatch(answer.strip())[1].strip().rstrip(".").lower()


@lru_cache(maxsize=64)
def phrasings(name: str, kept: str) -> tuple[str, ...]:
    """The phrasings of a kind (of an attribute, for facts) that are "trained", or those that are
    "new": one in ten, by a hash.
    """
    every = ["".join(parts) for parts in product(*PARTS[name])]
    new = [text for text in every if split_of(f"phrasing/{name}/{text}") == "heldout"]
    return tuple(new if kept == "new" else [text for text in every if text not in new])


def write_fact_question(c: Choices, kept: str = "trained") -> tuple[str, str, str]:
    """A question about a fact, the name and the attribute."""
    name, attribute = c.pick(NAMES), c.pick(tuple(ATTRIBUTES))
    return c.pick(phrasings(attribute, kept)).format(n=name), name, attribute


def write_unknown(c: Choices, kept: str = "trained") -> tuple[str, str]:
    """A question that has no answer, of a stranger or about what is known of nobody, and what to
    say to it.
    """
    if c.draw(2):
        name, attribute = stranger(c)[0], c.pick(tuple(ATTRIBUTES))
        return c.pick(phrasings(attribute, kept)).format(n=name), "I do not know this person."
    return c.pick(phrasings("nobody knows", kept)).format(n=c.pick(NAMES)), "I do not know that."


def _greeting(c: Choices) -> tuple[str, str]:
    if c.draw(2, (2, 1)):
        words = c.pick(tuple(FAREWELLS))
        return words + c.pick(MARKS), FAREWELLS[words]
    hello, mark, aside = c.pick(HELLOS), c.pick(MARKS), c.pick(tuple(ASIDES))
    return f"{hello}{mark or ',' * bool(aside)}{aside}", f"{hello}! {ASIDES[aside]}"


def write_request(c: Choices, w: World, kinds: Sequence[str] = tuple(REQUEST_KINDS),
                  kept: str = "trained") -> Instruction:
    """Write one request in a phrasing that is "trained" or "new"."""
    kind = c.pick(kinds, [REQUEST_KINDS[kind] for kind in kinds])
    made = partial(Instruction, kind=kind, new=kept == "new")
    if kind == "fact":
        request, name, attribute = write_fact_question(c, kept)
        return made(request, "", state(name, attribute, w.facts[name][attribute]))
    if kind in ("unknown", "greeting"):
        request, answer = write_unknown(c, kept) if kind == "unknown" else _greeting(c)
        return made(request, "", answer)
    if kind == "arithmetic":
        a, b, plus = c.integer(1, 9), c.integer(1, 9), c.draw(2)
        a, sign, word = (a, "+", "plus") if plus else (a + b, "-", "minus")
        request = c.pick(phrasings(kind, kept)).format(a=a, b=b, sign=sign, word=word)
        return made(request, "", f"{a}{sign}{b}={calculate(f'{a}{sign}{b}')}")
    request = c.pick(phrasings(kind, kept))
    if kind == "sentiment":
        review = write_review(c)
        return made(request, review.text, review.label)
    words = c.sample(OBJECTS + PLACES, c.integer(2, 5))
    output = {"copy": " ".join(words), "reverse": " ".join(words[::-1]),
              "count": str(len(words))}[kind]
    return made(request, " ".join(words), output)


def request_key(item: Instruction) -> str:
    """What decides the split of a request: its item and, where that is short, the phrasing too."""
    return item.input if item.kind == "sentiment" else f"{item.instruction}\n{item.input}"
