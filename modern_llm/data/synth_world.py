"""The grammar of the built-in world: its facts, and how facts, stories and reviews are written from
counted choices.

Each writer takes a `Choices` and is injective: two different sequences of choices never give the
same text (tests enumerate them), so the nats it counts are exactly -log p(text). What follows from
earlier words is not a choice and costs nothing: the facts of the world, who has the object at the
end of a story, the label of a review. Standard library only.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from modern_llm.data.synth_problems import NAMES, PEOPLE, PRONOUNS, Choices

ATTRIBUTES = {
    "home": ("city", "village", "valley", "castle", "desert", "forest"),
    "pet": ("dog", "cat", "bird", "horse", "fish", "rabbit"),
    "job": ("baker", "farmer", "teacher", "doctor", "driver", "painter"),
    "colour": ("red", "blue", "green", "yellow", "black", "white"),
    "food": ("bread", "soup", "cake", "rice", "cheese", "fruit"),
}
PHRASINGS = {
    "home": ("{s} lives in the {v}.", "{p} home is the {v}.", "{s} comes from the {v}."),
    "pet": ("{s} has a {v}.", "{p} pet is a {v}.", "{s} lives with a {v}."),
    "job": ("{s} is a {v}.", "{p} job is {v}.", "{s} works as a {v}."),
    "colour": ("{s} likes {v}.", "{p} colour is {v}.", "{s} wears {v}."),
    "food": ("{s} eats {v}.", "{p} food is {v}.", "{s} buys {v}."),
}
_ATTRIBUTES = tuple(ATTRIBUTES)


@dataclass(frozen=True)
class World:
    """The fixed facts: `facts[name][attribute]`. Each of an attribute's six values belongs to
    exactly two people.
    """

    seed: int = 0
    facts: dict[str, dict[str, str]] = field(init=False, compare=False)

    def __post_init__(self):
        rng = random.Random(f"world/{self.seed}")
        facts: dict[str, dict[str, str]] = {name: {} for name in NAMES}
        for attribute, values in ATTRIBUTES.items():
            dealt = list(values) * 2
            rng.shuffle(dealt)
            for name, value in zip(NAMES, dealt):
                facts[name][attribute] = value
        object.__setattr__(self, "facts", facts)


@lru_cache(maxsize=16)
def world(seed: int = 0) -> World:
    """The world of that seed (built once)."""
    return World(seed)


def state(name: str, attribute: str, value: str, phrasing: int = 0, pronoun: bool = False) -> str:
    """A sentence that says so: `Tom lives in the city.`"""
    he, his, _ = PRONOUNS[PEOPLE[name]]
    subject, owner = (he.capitalize(), his.capitalize()) if pronoun else (name, f"{name}'s")
    return PHRASINGS[attribute][phrasing].format(s=subject, p=owner, v=value)


def write_facts(c: Choices, w: World) -> tuple[str, dict]:
    """Two people, two to five facts of each in random order and phrasing, and one comparison, which
    follows.
    """
    people = c.sample(NAMES, 2)
    told = []
    for name in people:
        for i, attribute in enumerate(c.sample(_ATTRIBUTES, c.integer(2, 5))):
            told.append(state(name, attribute, w.facts[name][attribute],
                              c.draw(3), i > 0 and c.draw(2) == 0))
    attribute = c.pick(_ATTRIBUTES)
    same = w.facts[people[0]][attribute] == w.facts[people[1]][attribute]
    told.append(
        f"{people[0]} and {people[1]} {'have' if same else 'do not have'} the same {attribute}.")
    return " ".join(told), {"people": people, "attribute": attribute, "same": same}


# --- stories --------------------------------------------------------------------------------------

TIMES = ("One day", "One morning", "One evening", "Last week", "Last night", "On Monday",
         "On Friday", "On Sunday")
GOING = ("walked", "ran", "went", "drove")
PLACES = ("park", "river", "market", "school", "beach", "bridge", "garden", "station")
WEATHERS = ("hot", "cold", "wet", "windy")
GETTING = ("found", "bought", "saw", "took")
SIZES = ("big", "small", "long", "old", "nice", "lovely", "great", "dirty")
OBJECTS = ("ball", "book", "hat", "lamp", "key", "box", "map", "cup", "kite", "ring", "coin",
           "stone")
NEAR = ("near", "behind", "under", "beside")
SPOTS = ("tree", "bench", "table", "gate", "cart", "boat", "chair", "wall")
SIGHTS = SPOTS + ATTRIBUTES["pet"]
SAYING = ("What a nice", "I like this", "Look at this", "This is my")
SAID = ("said", "cried", "thought", "sang")
NEXT = ("Then", "Soon", "Later", "Now")
LATE = ("In the end", "At night", "That evening", "After that")
MOODS = {True: ("happy", "proud", "glad"), False: ("sad", "angry", "tired")}


def _thing(c: Choices, things: Sequence[str]) -> tuple[str, str]:
    """A described thing and its plain name: (`a big red ball`, `ball`)."""
    size, colour, thing = c.pick(SIZES), c.pick(ATTRIBUTES["colour"]), c.pick(things)
    return f"{'an' if size == 'old' else 'a'} {size} {colour} {thing}", thing


def _plot(c: Choices, w: World, hero: str, thing: str) -> tuple[list[str], dict]:
    """One of four things happens to the hero's `thing`. Returns the sentences and who then has
    which object.
    """
    he, his, _ = PRONOUNS[PEOPLE[hero]]
    plot, other = (c.pick(("give", "trade", "hide", "lose")),
                   c.pick([name for name in NAMES if name != hero]))
    her, job = PRONOUNS[PEOPLE[other]][2], w.facts[other]["job"]
    holder, held = other, thing
    if plot == "give":
        told = [f"{c.pick(NEXT)} {other} the {job} asked for the {thing}."]
        if c.draw(2):
            told.append(
                f"{hero} {c.pick(('smiled', 'laughed', 'said yes'))} and gave {her} the {thing}.")
        else:
            holder = hero
            told.append(f"{hero} {c.pick(('cried', 'ran away', 'said no'))} and kept the {thing}.")
    elif plot == "trade":
        holder, (described, held) = hero, _thing(c, [name for name in OBJECTS if name != thing])
        told = [f"{c.pick(NEXT)} {he} met {other} the {job}, who had {described}.",
                f"{hero} gave {her} the {thing} and got the {held}."]
    elif plot == "hide":
        near, spot, seen = c.pick(NEAR), c.pick(SPOTS), c.draw(2)
        looked = spot if seen else c.pick([place for place in SPOTS if place != spot])
        holder = other if seen else hero
        told = [f"{hero} put the {thing} {near} a {spot}.",
                f"{other} the {job} looked {near} a {looked} and "
                f"{'took' if seen else 'did not see'} the {thing}."]
    else:
        place = c.pick(PLACES)
        told = [f"{c.pick(NEXT)} {he} lost the {thing} at the {place}.",
                f"{other} the {job} {c.pick(GOING)} to the {place} and took the {thing}."]
    return told, {"hero": hero, "other": other, "plot": plot, "holder": holder, "object": held}


def write_story(c: Choices, w: World) -> tuple[str, dict]:
    """Somebody goes somewhere, gets an object, and something happens to it. Who has it at the end
    follows.
    """
    hero = c.pick(NAMES)
    (he, his, _), facts = PRONOUNS[PEOPLE[hero]], w.facts[hero]
    He = he.capitalize()
    told = [f"{c.pick(TIMES)}, {hero} the {facts['job']} {c.pick(GOING)} to the {c.pick(PLACES)}."]
    if c.draw(2, (2, 1)):
        weather = c.pick(WEATHERS)
        pet, hat = f"{his} {facts['pet']}", f"{his} {facts['colour']} hat"
        follows = {"hot": f"gave {pet} some water", "cold": f"put on {hat}",
                   "wet": f"took {pet} home", "windy": f"lost {hat}"}
        told.append(f"It was {weather}, so {he} {follows[weather]}.")
    sights = [_thing(c, SIGHTS)[0] for _ in range(c.pick((0, 2, 3)))]
    if sights:
        told.append(f"{He} saw {', '.join(sights[:-1])} and {sights[-1]}.")
    described, thing = _thing(c, OBJECTS)
    told.append(
        f"{c.pick(NEXT)} {he} {c.pick(GETTING)} {described} {c.pick(NEAR)} a {c.pick(SPOTS)}.")
    if c.draw(2):
        told.append(f'"{c.pick(SAYING)} {thing}," {he} {c.pick(SAID)}.')
    events, meta = _plot(c, w, hero, thing)
    ending = c.pick((f"went home to the {facts['home']}", f"ate some {facts['food']}",
                     f"played with {his} {facts['pet']}"))
    told += [*events, f"{c.pick(LATE)} {hero} {ending}."]
    mood = c.pick(MOODS[meta["holder"] == hero])
    told.append(f"{He} was {mood}, because {meta['holder']} had the {meta['object']}.")
    return " ".join(told), meta


# --- reviews --------------------------------------------------------------------------------------

LABELS = ("negative", "positive")
WHEN = ("last week", "last night", "on Monday", "on Friday", "on Sunday", "that evening",
        "one morning", "one day")
ASPECTS = ATTRIBUTES["food"] + ("food", "music", "water", "garden")
DEGREES = ("very", "quite", "so", "not")
OPINIONS = {True: ("good", "nice", "great", "lovely", "fresh", "fine"),
            False: ("bad", "poor", "old", "cold", "dirty", "awful")}


@dataclass(frozen=True)
class Review:
    """A review of one opinion or three; `label` is what most of them are ("positive" or "negative";
    `not good` is negative).
    """

    text: str
    label: str


def write_review(c: Choices) -> Review:
    """One opinion; or who went where and when, then three, of which the first two are joined by
    `and` if they agree, else by `but`.
    """
    parts, signs = [], []
    opening = ("" if c.draw(2)
               else f"{c.pick(NAMES)} {c.pick(GOING)} to the {c.pick(PLACES)} {c.pick(WHEN)}. ")
    for aspect in c.sample(ASPECTS, 3 if opening else 1):
        positive, degree = c.draw(2) == 1, c.pick(DEGREES)
        signs.append(positive)
        parts.append(f"he {aspect} was {degree} {c.pick(OPINIONS[positive != (degree == 'not')])}")
    if not opening:
        return Review(f"T{parts[0]}.", LABELS[positive])
    link = "and" if signs[0] == signs[1] else "but"
    return Review(f"{opening}T{parts[0]}, {link} t{parts[1]}. T{parts[2]}.",
                  LABELS[sum(signs) >= 2])
