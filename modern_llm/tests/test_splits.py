"""Whatever a person brings is split so that no text is on two sides, or refused with the size that
is needed and the one that was found.
"""

import json
import random
from itertools import islice

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modern_llm.config import DataConfig, get_pipeline_preset, override
from modern_llm.data import corpus, packing, pairs, reading, splits, tasks, tokens
from modern_llm.data.sources import DataError
from modern_llm.runs import data_files
from modern_llm.training import dpo, sft

TRAIN_ONLY, TEST_ONLY = splits.cut_splits(["train"], "train"), splits.cut_splits(["test"], "test")
pytestmark = pytest.mark.usefixtures("offline")
quick = settings(max_examples=40, deadline=None, derandomize=True)


def sentences(count, seed=0):
    """Sentences of made-up words, no two alike."""
    draw = random.Random(seed)
    return [" ".join("".join(draw.choices("abdeiklmnorstu", k=draw.randint(2, 8))) for _ in range(
        draw.randint(5, 14))).capitalize() + f" {i}." for i in range(count)]


def paragraphs(count, seed=0):
    found = iter(sentences(6 * count, seed))
    return [" ".join(islice(found, 6)) for _ in range(count)]


def rows_of(texts, field="text"):
    return "".join(json.dumps({field: text}) + "\n" for text in texts)


BROUGHT = {
    "a diary.txt": "\n\n".join(f"{day} March 1931\n{text}"
                               for day, text in enumerate(paragraphs(31), 1)),
    "a book of 193 KB.txt": "\n\n".join(paragraphs(700))[:193_000],
    "a book without blank lines.txt": "\n".join(paragraphs(700)),
    "a poem.txt": "\n\n".join("\n".join(sentences(4, i)) for i in range(4)),
    "a haiku of lines.txt": "\n".join(sentences(4)),
    "a sentence a line.txt": "\n".join(sentences(300)),
    "a document a line.txt": "\n".join(paragraphs(40)),
    "one giant line.txt": " ".join(sentences(900)),
    "one long paragraph.txt": " ".join(sentences(40)),
    "no spaces at all.txt": "".join(chr(0x4E00 + random.Random(1).randrange(2000) + i % 7)
                                    for i in range(9000)),
    "marked documents.txt": "<|endoftext|>".join(paragraphs(30)),
    "two marked documents.txt": "<|endoftext|>".join([
        "\n".join(sentences(40)), "\n".join(sentences(4, 1))]),
    "windows lines.txt": "\r\n".join(sentences(60)),
    "fifty notes.jsonl": rows_of(paragraphs(50)),
    "three rows.jsonl": rows_of(paragraphs(3)),
    "two rows.jsonl": rows_of(paragraphs(2)),
    "one row.jsonl": rows_of(paragraphs(1)),
    "the same row again and again.jsonl": rows_of(paragraphs(1) * 40),
    "blank rows between.jsonl": rows_of(["", *paragraphs(3), " \n", ""]),
    "a novel and notes.jsonl": rows_of([" ".join(sentences(900)), *paragraphs(11, 1)]),
    "letters.jsonl": rows_of("abcdefghijkl"),
    "three words.jsonl": rows_of(["one", "two", "three"]),
    "two short documents.txt": "Good morning.<|endoftext|>Good night.",
    "500 rows.jsonl": rows_of(sentences(500)),
    "a table.csv": "text,label\n"
                   + "".join(f"{text},{i}\n" for i, text in enumerate(sentences(30))),
    "a table.tsv": "text\tlabel\n"
                   + "".join(f"{text}\t{i}\n" for i, text in enumerate(sentences(30))),
}


@pytest.mark.fault("small-splits")
@pytest.mark.parametrize("name", BROUGHT)
def test_what_a_person_brings_is_split(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(BROUGHT[name].encode())
    train, held = (list(reading.documents(str(path), split)) for split in ("train", "validation"))
    assert train and held and not set(train) & set(held)
    sizes = sum(map(len, train)), sum(map(len, set(held)))
    assert ((sizes[1] <= 0.25 * sum(sizes) or sum(sizes) < splits.MIN_CHARS)
            and all(text.strip() for text in train + held))
    # nothing is lost and nothing is there twice, white space and order aside
    if "again and again" not in name:
        whole = BROUGHT[name].replace("<|endoftext|>", "")
        if name.endswith(".jsonl"):
            whole = "".join(json.loads(line)["text"] for line in whole.splitlines())
        if name.endswith(("txt", "jsonl")):
            assert sorted("".join("".join(train + held).split())) == sorted("".join(whole.split()))
    assert "held out for validation" in reading.how_split(str(path))
    assert ([list(reading.documents(str(path), split)) for split in ("train", "validation")]
            == [train, held])


@pytest.mark.fault("small-splits")
@pytest.mark.parametrize("name",
                         ["a diary.txt", "a poem.txt", "one giant line.txt", "two rows.jsonl",
                          "the same row again and again.jsonl", "letters.jsonl"])
def test_what_is_split_can_be_packed_and_scored(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(BROUGHT[name].encode())
    config = DataConfig(sources=(str(path),), tokenizer_vocab_size=2048)  # more than the text gives
    tokenizer = tokens.make_tokenizer(config, tmp_path)
    train, held = corpus.load_corpus(config, tokenizer, tmp_path, progress=False)
    assert 261 <= tokenizer.get_vocab_size() <= 2048
    # also of a text shorter than a row
    assert packing.PackedBatches(train, 512, 8)(3)["input_ids"].shape == (8, 512)
    scored = sum(int((batch["labels"] >= 0).sum())
                 for batch in packing.validation_batches(held[str(path)], 512, 8))
    assert scored == held[str(path)].num_tokens
    assert corpus.data_card(train).note[0] == reading.how_split(str(path)) != ""


TOO_SMALL = {
    "a word.txt": ("Hi",
                   "found 1 different document with 2 characters, and 100 or more are needed"),
    "a line.txt": ("Hello world.\n", "found 1 different document with 12 characters"),
    "a short row.jsonl": (rows_of(["Hello."] * 9), "found 1 different document with 6 characters"),
    "blank rows.jsonl": (rows_of(["", " "]), "found 0 different documents"),
}


@pytest.mark.fault("small-splits")
@pytest.mark.parametrize("name", TOO_SMALL)
def test_what_is_too_small_is_told_the_size_that_is_needed(name, tmp_path):
    path, (content, message) = tmp_path / name, TOO_SMALL[name]
    path.write_text(content)
    for split in ("train", "validation"):
        with pytest.raises(DataError, match=message) as caught:
            next(reading.documents(str(path), split))
        assert str(path) in str(caught.value)
    config = override(get_pipeline_preset("lesson"), {"data": {"sources": [str(path)]}})
    said, problems = data_files.check_splits(config, "pretrain")  # a stage asks before it begins
    assert said == [] and message in problems[0]


ROWS = {
    "alpaca": lambda i: {"instruction": f"What is {i} plus {i}?", "input": "",
                         "output": f"It is {2 * i}."},
    "hh-rlhf": lambda i: {"chosen": f"\n\nHuman: Is {i} odd?\n\nAssistant: Yes.",
                          "rejected": f"\n\nHuman: Is {i} odd?\n\nAssistant: No."},
    "gsm8k": lambda i: {"question": f"Ann has {i} apples and buys 2. How many?",
                        "answer": f"{i}+2=<<{i}+2={i + 2}>>{i + 2}\n#### {i + 2}"},
}
READ = {
    "alpaca": lambda split: [e.request for e in sft.instructions("alpaca", split, 99)],
    "hh-rlhf": lambda split: [p.request for p in pairs.preference_pairs("hh-rlhf", split, 99)[0]],
    "gsm8k": lambda split: [p.question for p in tasks.word_problems("gsm8k", split, 99)]}


def mirror(tmp_path, monkeypatch, name, rows, stem="train"):
    (tmp_path / name).mkdir()
    (tmp_path / name / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("MODERN_LLM_DATA", str(tmp_path))


@pytest.mark.fault("small-splits")
@pytest.mark.parametrize("count, held_out", [(2, 1), (3, 1), (12, 2), (20, 2), (60, 6)])
@pytest.mark.parametrize("name", ROWS)
def test_a_few_rows_are_enough_for_both_splits(name, count, held_out, tmp_path, monkeypatch):
    mirror(tmp_path, monkeypatch, name, map(ROWS[name], range(count)))
    train, held = READ[name]("train"), READ[name]("validation")
    assert len(held) == held_out and len(train) == count - held_out and not set(train) & set(held)
    assert (reading.how_split(name)
            == f"of {count} different rows {held_out} held out for validation, chosen by a hash")


@pytest.mark.fault("small-splits")
@pytest.mark.parametrize("count", [3, 4, 20, 600])
def test_of_a_lone_test_split_three_are_cut(count, tmp_path, monkeypatch):
    mirror(tmp_path, monkeypatch, "gsm8k",
           [row for i in range(count) for row in [ROWS["gsm8k"](i)] * 2], "test")
    sides = [set(READ["gsm8k"](split)) for split in ("train", "validation", "test")]
    assert all(sides) and sum(map(len, sides)) == len(set.union(*sides)) > 0
    assert len(set.union(*sides)) == count or count > 99


@pytest.mark.fault("small-splits")
@pytest.mark.parametrize("name", ROWS)
def test_a_single_row_cannot_be_split(name, tmp_path, monkeypatch):
    mirror(tmp_path, monkeypatch, name, [ROWS[name](1)] * 5)
    with pytest.raises(DataError, match=f"{name}: .*found 1 different row, and 2 or more are "
                                        "needed, one each for train, validation"):
        READ[name]("train")


@pytest.mark.fault("small-splits")
@pytest.mark.parametrize("wanted", [0, 50])
@pytest.mark.parametrize("count", [12, 500])
def test_rows_of_a_single_bucket_are_split_all_the_same(count, wanted):
    texts = list(
        islice((f"row {i}" for i in range(10**6) if splits.bucket(f"row {i}") == wanted), count))
    for divisible in (True, False):
        cut = splits.make_cut(texts, TRAIN_ONLY, "here", divisible)
        sides = [{text for text in texts if cut.part(text, split)} for split in TRAIN_ONLY]
        assert all(sides) and not sides[0] & sides[1] and sides[0] | sides[1] == set(texts)


@pytest.mark.fault("small-splits")
def test_articles_of_a_lone_train_split_stay_whole(tmp_path, monkeypatch):
    pages = [f" = Town {i} = \n\n {text} \n\n = = River = = \n\n {text[::-1]} \n"
             for i, text in enumerate(paragraphs(30))]
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "train.txt").write_text("\n" + "\n".join(pages))
    monkeypatch.setenv("MODERN_LLM_DATA", str(tmp_path))
    sides = [list(reading.documents("wikitext-2", split)) for split in ("train", "validation")]
    assert (len(sides[0]) + len(sides[1]) == 30
            and 2 <= len(sides[1]) <= 5 and all("River" in page for side in sides for page in side))


@pytest.mark.fault("small-splits")
def test_a_text_shorter_than_a_row_is_replayed(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text(" ".join(sentences(5)))
    config = DataConfig(sources=(str(path),))
    tokenizer = tokens.make_tokenizer(config, tmp_path)
    rows = dpo.replay_rows(tokenizer, ("text",), config, 4, 1024)
    assert rows["input_ids"].shape[1] == 1024 and len(rows["labels"]) >= 1


# ---- properties


texts_of = st.lists(st.text(st.sampled_from("ab .\n"), min_size=1, max_size=80), min_size=1,
                    max_size=30)


@pytest.mark.fault("small-splits")
@pytest.mark.parametrize("hundredths", [TRAIN_ONLY, TEST_ONLY], ids=["train only", "test only"])
@pytest.mark.parametrize("divisible", [True, False], ids=["texts", "rows"])
@quick
@example(["a", ".", "aaaaaaaaa"])  # the two lightest are a tenth of all, and two splits wait
@given(texts_of)
def test_every_character_is_on_one_side(divisible, hundredths, texts):
    try:
        cut = splits.make_cut(texts, hundredths, "here", divisible)
    except DataError as error:
        different = {text for text in texts if text.strip() or not divisible}
        assert (len(different) < len(hundredths)
                or divisible and sum(map(len, different)) >= splits.MIN_CHARS), error
        return
    for text in filter(str.strip, texts):
        assert ("".join(text[part] for split in hundredths if (part := cut.part(text, split)))
                == text)
    assert all(any(cut.part(text, split) for text in texts) for split in hundredths)


@pytest.mark.fault("small-splits")
@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.lists(st.text(max_size=12), max_size=40))
def test_no_text_of_a_large_corpus_changes_sides_when_others_are_added(seed, added):
    texts = [f"{seed} {i}" for i in range(splits.SMALL)]
    before, after = (splits.make_cut(found, TRAIN_ONLY, "here")
                     for found in (texts, [*texts, *added]))
    assert all(before.part(text, split) == after.part(text, split) for text in texts
               for split in TRAIN_ONLY)


@quick
@given(st.lists(st.text(st.sampled_from("ab. "), max_size=60), max_size=40), st.integers(1, 50))
def test_blocks_lose_nothing(lines, min_chars):
    assert ("".join("".join(splits.text_blocks(lines, min_chars=min_chars)).split())
            == "".join("".join(lines).split()))


@quick
@given(st.text(st.sampled_from("ab.\n "), min_size=1, max_size=90), st.data())
def test_a_cut_is_near(text, draw):
    at, reach = draw.draw(st.integers(0, len(text))), draw.draw(st.integers(0, 20))
    assert abs(splits.cut_near(text, at, reach) - at) <= reach
