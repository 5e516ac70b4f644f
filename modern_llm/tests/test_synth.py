"""The built-in world: its ground truths, its splits, and the exactness of its entropy floor."""

import math
import random
import re
from itertools import islice

import pytest

from modern_llm.data import marking, synth, synth_problems, synth_requests, synth_world
from modern_llm.data.synth_problems import Choices, write_problem


class Scripted(Choices):
    """Choices that follow a list of indices (modulo the options there are), then random ones or,
    without `rng`, zeros.

    `trace` has (options, index) of each draw, `spent` the nats after it.
    """

    def __init__(self, script=(), rng=None):
        super().__init__(rng or random.Random(0))
        self.script, self.free, self.trace, self.spent = script, rng is not None, [], []

    def draw(self, n, weights=None):
        at, before = len(self.trace), self.nats
        index = super().draw(n, weights)
        if at < len(self.script) or not self.free:
            index = self.script[at] % n if at < len(self.script) else 0
            self.nats = before + (math.log(n) if weights is None
                                  else math.log(sum(weights) / weights[index]))
        self.trace.append((n, index))
        self.spent.append(self.nats)
        return index


def everything(write, prefix=()):
    """(text, nats) of every way to go on after `prefix`, by depth-first search."""
    script = list(prefix)
    while True:
        choices = Scripted(script)
        text = write(choices)
        yield text, choices.nats
        trace = choices.trace
        while len(trace) > len(prefix) and trace[-1][1] == trace[-1][0] - 1:
            trace.pop()
        if len(trace) == len(prefix):
            return
        script = [index for _, index in trace[:-1]] + [trace[-1][1] + 1]


def total_probability(outcomes):
    """Sum of exp(-nats) over distinct texts; fails if a text is written in two ways."""
    seen = {}
    for text, nats in outcomes:
        assert text not in seen, f"two ways to write {text!r}"
        seen[text] = nats
    return math.fsum(math.exp(-nats) for nats in seen.values()), len(seen)


WORLD = synth.world(0)
asked = lambda item: (item.instruction, item.input)
WRITERS = {
    "story": lambda c: synth_world.write_story(c, WORLD)[0],
    "facts": lambda c: synth_world.write_facts(c, WORLD)[0],
    "review": lambda c: synth_world.write_review(c).text,
    "problem": lambda c: write_problem(c).question,
    "request": lambda c: "\n".join(asked(synth_requests.write_request(c, WORLD))),
    "document": lambda c: synth._write_document(c, WORLD, synth.KINDS)[0],
}


# --- the floor ------------------------------------------------------------------------------------


def test_probabilities_of_all_level_1_problems_sum_to_one_and_their_mean_is_the_entropy(
    monkeypatch
):
    monkeypatch.setattr(synth_problems, "NAMES", synth.NAMES[:1])
    monkeypatch.setattr(synth_problems, "STRANGERS", {"Kadan": "he"})
    monkeypatch.setattr(synth_problems, "ITEMS", synth_problems.ITEMS[:1])
    outcomes = list(everything(lambda c: write_problem(c, (1,)).question))
    total, n = total_probability(outcomes)
    assert n > 10_000 and total == pytest.approx(1, abs=1e-9)
    entropy = math.fsum(math.exp(-nats) * nats for _, nats in outcomes)
    rng, sampled = random.Random(1), []
    for _ in range(4000):
        choices = Choices(rng)
        write_problem(choices, (1,))
        sampled.append(choices.nats)
    deviation = math.sqrt(sum((x - entropy) ** 2 for x in sampled)) / len(sampled)
    assert abs(sum(sampled) / len(sampled) - entropy) < 4 * deviation


def test_probabilities_of_all_stories_of_a_small_grammar_sum_to_one(monkeypatch):
    one = ("SIGHTS", "TIMES", "GOING", "PLACES", "GETTING", "SIZES", "SAYING", "SAID",
           "NEXT", "LATE")
    two = ("NAMES", "WEATHERS", "NEAR", "SPOTS", "OBJECTS")
    for table, size in {**dict.fromkeys(one, 1), **dict.fromkeys(two, 2)}.items():
        monkeypatch.setattr(synth_world, table, getattr(synth_world, table)[:size])
    monkeypatch.setitem(synth_world.ATTRIBUTES, "colour", ("red",))
    monkeypatch.setattr(synth_world, "MOODS", {True: ("happy",), False: ("sad",)})
    total, n = total_probability(everything(WRITERS["story"]))
    assert n > 10_000 and total == pytest.approx(1, abs=1e-9)


def test_a_hidden_choice_would_be_noticed():
    with pytest.raises(AssertionError, match="two ways"):
        total_probability(everything(lambda c: "rain" if c.draw(3) == 0 else "sun"))
    assert (total_probability(everything(lambda c: "rain" if c.draw(2, (2, 1)) else "sun"))
            == (pytest.approx(1), 2))


@pytest.mark.parametrize("kind", WRITERS)
def test_every_choice_shows_in_the_text(kind):
    """The last draws of random texts, enumerated: their conditional probabilities sum to one over
    distinct texts.
    """
    write = WRITERS[kind]
    for seed in range(40):
        first = Scripted(rng=random.Random(seed))
        write(first)
        cut, leaves = len(first.trace), 1
        while cut > 0 and leaves * first.trace[cut - 1][0] <= 400:
            cut -= 1
            leaves *= first.trace[cut][0]
        while True:  # another choice may lead to more texts than this one
            prefix = [index for _, index in first.trace[:cut]]
            outcomes = list(islice(everything(write, prefix), 5000))
            if len(outcomes) < 5000:
                break
            cut += 1
        total, _ = total_probability(outcomes)
        assert total == pytest.approx(math.exp(-first.spent[cut - 1] if cut else 0), rel=1e-9)


@pytest.mark.parametrize("kind", WRITERS)
def test_changing_any_one_choice_changes_the_text(kind):
    write = WRITERS[kind]
    for seed in range(60):
        first = Scripted(rng=random.Random(seed))
        text, script = write(first), [index for _, index in first.trace]
        for at, (n, _) in enumerate(first.trace):
            texts = {write(Scripted([*script[:at], other, *script[at + 1:]])) for other in range(n)}
            assert len(texts) == n and text in texts, (
                f"draw {at} of {text!r} has alternatives that read the same")


@pytest.mark.parametrize("kind", WRITERS)
def test_equal_texts_come_from_equal_choices(kind):
    seen, rng = {}, random.Random(3)
    for _ in range(8000):
        choices = Scripted(rng=rng)
        text = WRITERS[kind](choices)
        assert seen.setdefault(text, choices.trace) == choices.trace


def test_floor_sums_and_split_correction():
    texts = list(islice(synth.documents("heldout"), 200))
    floor = synth.entropy_floor(texts, tokens=20_000)
    assert floor["documents"] == 200 and floor["nats"] == pytest.approx(sum(d.nats for d in texts))
    assert floor["nats_per_token"] == pytest.approx(floor["nats"] / 20_000)
    assert floor["strict_nats"] == pytest.approx(floor["nats"] - 200 * math.log(10))
    with pytest.raises(ValueError, match="no documents"):
        synth.entropy_floor([])
    keys = [WRITERS["story"](Choices(random.Random(i))) for i in range(20_000)]
    share = sum(synth.split_of(key) == "heldout" for key in keys) / len(keys)
    assert abs(share - 0.1) < 4 * math.sqrt(0.09 / len(keys))


def test_the_choice_of_kind_counts():
    for kind, share in synth.KINDS.items():
        script = [list(synth.KINDS).index(kind)]
        alone, mixed = Scripted([0], random.Random(5)), Scripted(script, random.Random(5))
        text = synth._write_document(alone, WORLD, {kind: share})[0]
        assert text == synth._write_document(mixed, WORLD, synth.KINDS)[0]
        assert mixed.nats - alone.nats == pytest.approx(-math.log(share))


def test_documents_are_as_described():
    texts = list(islice(synth.documents(), 4000))
    for kind, share in synth.KINDS.items():
        assert abs(sum(d.kind == kind for d in texts) / len(texts) - share) < 0.03
    starts = {"problem": "Question: ", "exchange": "Question: ", "review": "Review: "}
    assert all(d.text.startswith(starts[d.kind]) for d in texts if d.kind in starts)
    assert len({word.lower() for d in texts for word in re.findall(r"[A-Za-z]+", d.text)}) < 360
    assert all(d.text.isascii() and "  " not in d.text and len(d.text) < 700 for d in texts)


# --- determinism and splits -----------------------------------------------------------------------

SOURCES = {
    "documents": (synth.documents, lambda d: d.text),
    "problems": (synth.problems, lambda p: p.question),
    "instructions": (synth.instructions, lambda x: (x.instruction, x.input)),
    "preferences": (synth.preferences, lambda p: p.prompt),
    "sentiment": (synth.sentiment, lambda r: r.text),
}


@pytest.mark.parametrize("source", SOURCES)
def test_sources_repeat_and_splits_are_disjoint(source):
    generate, key = SOURCES[source]
    assert list(islice(generate("train", 7), 50)) == list(islice(generate("train", 7), 50))
    assert list(islice(generate("train", 7), 50)) != list(islice(generate("train", 8), 50))
    train = {key(item) for item in islice(generate("train", 0), 5000)}
    heldout = {key(item) for item in islice(generate("heldout", 1), 5000)}
    assert train and heldout and not train & heldout
    with pytest.raises(ValueError, match=r"split='heldut' is unknown; did you mean 'heldout'\?"):
        generate("heldut")


def test_splits_are_disjoint_across_sources():
    trained = list(islice(synth.documents("train"), 5000))
    questions = {
        re.match(r"Question: (.*)\n", d.text).group(1) for d in trained if d.kind == "problem"}
    assert not questions & {p.question for p in islice(synth.problems("heldout", levels=[1]), 3000)}
    reviews = {d.text.split("Review: ")[1].split("\n")[0] for d in trained if d.kind == "review"}
    assert not reviews & {r.text for r in islice(synth.sentiment("heldout"), 2000)}
    asked = {x.instruction for x in islice(synth.instructions("train", kinds=["fact"]), 5000)}
    assert not asked & {p.prompt for p in islice(synth.preferences("heldout"), 2000)}


def test_documents_resume_anywhere():
    whole = list(islice(synth.documents(seed=3), 30))
    assert list(islice(synth.documents(seed=3, start=20), 10)) == whole[20:]


@pytest.mark.parametrize("call, message", [
    (lambda: synth.documents(kinds=["storys"]),
     r"kind='storys' is unknown; did you mean 'story'\?"),
    (lambda: synth.documents(kinds=[]), "is empty"),
    (lambda: synth.problems(levels=[9]), r"level=9 is unknown; valid: 1, 2, 3, 4, 5"),
    (lambda: synth.problems(levels=[]), "is empty"),
    (lambda: synth.instructions(kinds=["cout"]), r"did you mean 'count'\?"),
    (lambda: synth.instructions(kinds=[]), "is empty"),
    (lambda: synth.obeys("polit", "x", "x"), r"rule='polit' is unknown; did you mean 'polite'\?"),
])
def test_unknown_names_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- ground truths --------------------------------------------------------------------------------


def test_world_deals_each_value_twice_and_depends_on_its_seed():
    for seed in range(5):
        facts = synth.World(seed).facts
        for attribute, values in synth.ATTRIBUTES.items():
            assert sorted(facts[name][attribute] for name in facts) == sorted(values * 2)
    assert synth.World(0).facts != synth.World(1).facts


def test_facts_documents_state_the_facts_and_all_facts_are_in_the_training_split():
    said = set()
    for document in islice(synth.documents(kinds=["facts"]), 2000):
        sentences = re.findall(r"[^.]+\.", document.text)
        speaker = None
        for sentence in (s.strip() for s in sentences[:-1]):
            speaker = next((n for n in WORLD.facts if re.match(rf"{n}\b", sentence)), speaker)
            true = [a for a, v in WORLD.facts[speaker].items()
                    for i in range(3) for pronoun in (False, True)
                    if synth.state(speaker, a, v, i, pronoun) == sentence]
            assert len(true) == 1, sentence
            said.add((speaker, true[0]))
        comparison = r"(\w+) and (\w+)( do not)? have the same (\w+)\."
        a, b, no, attribute = re.fullmatch(comparison, sentences[-1].strip()).groups()
        assert (WORLD.facts[a][attribute] == WORLD.facts[b][attribute]) == (no is None)
    assert len(said) == 60


def test_story_endings_follow_from_the_text():
    """An own reading of the text, sentence by sentence, ends with the same holder and object; facts
    are the world's.
    """
    for document in islice(synth.documents(kinds=["story"]), 1500):
        text, meta = document.text, document.meta
        hero = re.match(r".*?, (\w+) the", text).group(1)
        thing = re.search(r"(?:found|bought|saw|took) an? \w+ \w+ (\w+) (?:near|behind|under"
                          r"|beside)", text).group(1)
        holder, held = hero, thing
        for sentence in re.split(r"(?<=\.) ", text)[:-1]:
            if swap := re.fullmatch(rf"{hero} gave (?:him|her) the {thing} and got the (\w+)\.",
                                    sentence):
                held = swap.group(1)
            elif (re.search(rf"gave (him|her) the {thing}\.", sentence)
                  or sentence.endswith(f" and took the {thing}.")):
                holder = meta["other"]
        assert (holder, held) == (meta["holder"], meta["object"])
        assert text.endswith(f", because {holder} had the {held}.")
        jobs = re.findall(r"\b(?!In)([A-Z]\w+) the (\w+)", text)
        assert jobs and all(WORLD.facts[name]["job"] == job for name, job in jobs)
        homes = re.findall(r"(\w+) went home to the (\w+)", text)
        assert all(WORLD.facts[name]["home"] == place for name, place in homes)


def test_review_labels_are_the_majority():
    for document in islice(synth.documents(kinds=["review"]), 1000):
        opinions = re.findall(r"was (\w+) (\w+)", document.text)
        good = sum((word in synth_world.OPINIONS[True]) != (degree == "not")
                   for degree, word in opinions)
        assert len(opinions) in (1, 3) and document.text.endswith(
            f"\nSentiment: {synth.LABELS[2 * good > len(opinions)]}")
    labels = [r.label for r in islice(synth.sentiment(), 2000)]
    assert abs(labels.count("positive") / 2000 - 0.5) < 0.05


def test_problems_are_right_and_in_gsm8k_format():
    line = r"(\w+|Then s?he) has (\d+)([+*-])(\d+)=<<\2\3\4=(\d+)>>\5 \w+\."
    steps = {1: 1, 2: 2, 3: 3, 4: 3, 5: 4}
    for problem in islice(synth.problems(), 2000):
        *worked, last = problem.answer.split("\n")
        assert (len(worked) == steps[problem.level]
                and all(re.fullmatch(line, text) for text in worked))
        assert last == f"#### {problem.value}" and problem.value > 0
        assert (synth.extract_answer(problem.answer) == problem.value
                and synth.check_solution(problem.answer))
        # solve the question independently
        numbers = [int(n) for n in re.findall(r"\d+", problem.question)]
        value = numbers[0] * numbers[1] if "boxes" in problem.question else numbers[0]
        gain = "|".join(synth_problems.GAINS)
        for verb, number in re.findall(r" (\w+(?: away)?) (\d+)", problem.question)[1:]:
            value += int(number) * (1 if verb in gain else -1) * (verb != "with")
        assert value == problem.value
    assert {p.level for p in islice(synth.problems(levels=[2, 4]), 50)} == {2, 4}


@pytest.mark.parametrize(
    "text, answer", [("so\n#### 72", 72), ("#### 1,234", 1234), ("#### $5", 5),
                     ("#### -3", -3), ("72", None), ("#### no", None), ("", None)])
def test_extract_answer(text, answer):
    assert synth.extract_answer(text) == answer


@pytest.mark.parametrize(
    "text, right",
    [("3+4=<<3+4=7>>7", True), ("<<48/2=24>>24", True), ("$<<5*.5=2.5>>2.5", True),
     ("<<(1+2)*3=9>>9", True), ("<<1,000+1=1001>>1,001", True), ("<<1/3=.33>>.33", True),
     ("<<05+1=6>>6", True), ("<<3+4=8>>8", False), ("<<3+4=7>>8", False),
     ("no marks", False), ("<<3+4=7>>7 <<1+", False), ("<<1/0=1>>1", False),
     ("<<a+b=c>>c", False), ("<<2**9=512>>512", False), ("<<__import__('os')=1>>1", False)])
def test_check_solution(text, right):
    assert synth.check_solution(text) is right


def test_instruction_outputs_are_right():
    facts = {synth.state(n, a, v) for n, own in WORLD.facts.items() for a, v in own.items()}
    for item in islice(synth.instructions(), 3000):
        words = item.input.split()
        expected = {"copy": " ".join(words), "reverse": " ".join(reversed(words)),
                    "count": str(len(words))}
        assert (item.check(item.output) and item.check(f" {item.output.rstrip('.')}\n")
                and not item.check(""))
        assert not item.check(item.output + " and more")
        if item.kind in expected:
            assert item.output == expected[item.kind] and 2 <= len(words) <= 5
        elif item.kind == "arithmetic":
            a, sign, b = re.search(r"(\d+) ?([+-]|plus|minus) ?(\d+)", item.instruction).groups()
            sign = {"plus": "+", "minus": "-"}.get(sign, sign)
            value = int(a) + int(b) if sign == "+" else int(a) - int(b)
            assert item.output == f"{a}{sign}{b}={value}"
        elif item.kind == "fact":
            name = next(n for n in WORLD.facts if re.search(rf"\b{n}\b", item.instruction))
            assert item.output in facts and item.output.startswith(name)
        elif item.kind == "unknown":
            known = any(re.search(rf"\b{name}\b", item.instruction) for name in WORLD.facts)
            assert item.output == f"I do not know {'that' if known else 'this person'}."
        elif item.kind == "greeting":
            assert item.output[-1] in ".?!"
        else:
            assert item.output in synth.LABELS
    assert {x.kind for x in islice(synth.instructions(), 200)} == set(synth.INSTRUCTION_KINDS)


def test_conversations_are_instructions_and_sometimes_a_problem_at_the_end():
    found = list(islice(synth.conversations("heldout"), 400))
    alone = [turns for turns in found if len(turns) == 1]
    assert {len(turns) for turns in found} == {1, 2, 3} and 160 < len(alone) < 240
    told = [turn for turns in found for turn in turns if turn.kind == "problem"]
    longer = [turns for turns in found if len(turns) > 1]
    assert 0.15 < len(told) / len(longer) < 0.35
    assert all(turns[-1].kind == "problem" for turns in longer
               if any(turn.kind == "problem" for turn in turns))
    asked = iter(islice(synth.instructions("heldout"), 2000))
    assert all(turn in asked for turns in found for turn in turns if turn.kind != "problem")
    known = set(islice(synth.problems("heldout"), 400))
    assert {(turn.instruction, turn.output) for turn in told} <= {
        (problem.question, problem.answer) for problem in known}


def test_new_phrasings_are_never_trained():
    for kind in (*synth_requests.PARTS,):
        trained, new = (synth_requests.phrasings(kind, kept) for kept in ("trained", "new"))
        assert trained and new and not set(trained) & set(new)
    asked = {turn.instruction for turns in islice(synth.conversations(), 3000) for turn in turns}
    new = [item for item in islice(synth.instructions("heldout", phrasings="new"), 300)
           if item.input]
    assert new and not {item.instruction for item in new} & asked
    assert all(item.new and item.kind != "greeting" for item in new)


@pytest.mark.parametrize("said, plainly", [
    ("Of course. Tom has a dog. Have a nice day.", "tom has a dog"),
    (" Tom has a dog", "tom has a dog"), ("Not again. 3+4=7 I hate to help.", "3+4=7"),
    ("Good day. Have a nice day.", "have a nice day"),
    ("", ""), ("Of course.", "of course"), ("Hello! What can I do for you?", None),
])
def test_courtesy_is_taken_off_once(said, plainly):
    assert synth_requests.plain(said) == (said.lower() if plainly is None else plainly)


def test_preferences_break_exactly_the_named_rule_and_length_tells_nothing():
    pairs = list(islice(synth.preferences(), 4000))
    for pair in pairs:
        assert all(synth.obeys(rule, pair.chosen, pair.chosen) for rule in synth.RULES)
        broken = [rule for rule in synth.RULES
                  if not synth.obeys(rule, pair.rejected, pair.chosen)]
        assert broken == [pair.rule]
    longer = (sum(len(p.chosen) > len(p.rejected) for p in pairs)
              - sum(len(p.chosen) < len(p.rejected) for p in pairs))
    assert abs(longer) / len(pairs) < 0.03
    assert abs(sum(len(p.chosen) - len(p.rejected) for p in pairs)) / len(pairs) < 0.1
    honest = [pair for pair in pairs if "I do not know" in pair.chosen]
    assert 0.15 < len(honest) / len(pairs) < 0.25 and {p.rule for p in honest} == {"polite", "kind"}
    chosen = "Of course. Tom has a dog. Have a nice day."
    assert synth.obeys("true", "tom has a dog", chosen)
    for wrong in ("Of course. I do not know. Have a nice day.", "Tom has a cat.", "Tom",
                  "Of course. Of course. Tom has a dog. Have a nice day."):
        assert not synth.obeys("true", wrong, chosen)


def test_leaves_need_the_standard_library_only():
    import ast
    import sys
    for module in (marking, synth, synth_problems, synth_requests, synth_world):
        for node in ast.walk(ast.parse(open(module.__file__, encoding="utf-8").read())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert (name.startswith(("modern_llm.data.synth_", "modern_llm.data.marking"))
                        or name.split(".")[0] in sys.stdlib_module_names)
