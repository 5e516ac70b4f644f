"""The registry: every data set has its kind and a parser that reads its rows, and one entry more is
all that a new one takes.
"""

import json
from dataclasses import replace
from itertools import islice

import pytest
from click.testing import CliRunner

from modern_llm import cli
from modern_llm.config import (
    CHAT_KINDS, DATASET_REGISTRY, KINDS, ConfigError, DatasetInfo, get_pipeline_preset, names_of,
    override, register_dataset,
)
from modern_llm.data.pairs import Pair, preference_pairs
from modern_llm.data.reading import documents, items
from modern_llm.data.sources import DatasetNotFound, find_source
from modern_llm.data.synth import Problem, Review
from modern_llm.data.tasks import sentences, word_problems
from modern_llm.evaluation.contamination import training_sources, training_texts
from modern_llm.evaluation.overlap import find_overlap
from modern_llm.runs.data_files import data_names
from modern_llm.training.sft import instructions

ITEM = {"text": str, "chats": list, "pairs": (Pair, str), "problems": Problem, "sentences": Review}


@pytest.fixture
def added(monkeypatch, tmp_path):
    """Adds an entry and rows of it to a mirror, for one test."""
    monkeypatch.setenv("MODERN_LLM_DATA", str(tmp_path))
    before = dict(DATASET_REGISTRY)

    def add(name, kind, rows, **more):
        for split in ("train", "validation", "test"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{split}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return register_dataset(DatasetInfo(name, "", "CC0", kind, tuple(rows[0]), **more))

    yield add
    DATASET_REGISTRY.clear()
    DATASET_REGISTRY.update(before)


@pytest.mark.parametrize("name", DATASET_REGISTRY)
def test_every_entry_has_a_kind_and_a_parser(name):
    info = DATASET_REGISTRY[name]
    assert info.kind in KINDS and bool(info.parse) == (info.kind != "text")
    try:
        find_source(name)
    except DatasetNotFound:
        pytest.skip(f"{name} is not here: set MODERN_LLM_DATA")
    found = list(islice(items(name), 50))
    assert found and all(isinstance(item, ITEM[info.kind]) for item in found)
    if info.kind == "chats":
        assert all([m["role"] for m in item]
                   == [("user", "assistant")[i % 2] for i in range(len(item))] for item in found)


def chat(row):
    return [{"role": "user", "content": row["ask"]},
            {"role": "assistant", "content": row["say"]}]


def test_chats_in_one_entry(added):
    added("kitchen", "chats", [{"ask": f"How is dish {i} made?", "say": f"Boil it {i} times."}
                               for i in range(40)], parse=chat)
    found = instructions("kitchen", "train", 5)
    assert [e.request for e in found] == [f"How is dish {i} made?" for i in range(5)]
    config = override(get_pipeline_preset("local-smoke"),
                      {"sft": {"sources": ["kitchen"], "weights": [1]},
                       "dpo": {"replay_sources": ["kitchen"], "replay_weight": 0.1}})
    assert data_names(config, "sft") == ["kitchen"] and "kitchen" in data_names(config, "dpo")
    lines = training_sources(config).set_index("source")
    assert tuple(lines.loc["kitchen"]) == ("kitchen", "chats", "sft, dpo")
    overlap = find_overlap({"asked": ["How is dish 3 made? Boil it 3 times."]},
                           training_texts("kitchen"), n=8)
    assert overlap.share.tolist() == [1.0]
    printed = CliRunner().invoke(cli.main, ["datasets", "kitchen"])
    assert printed.exit_code == 0 and "120 rows" in printed.output
    assert "kitchen" in CliRunner().invoke(cli.main, ["datasets"]).output


def test_pairs_in_one_entry(added):
    added("manners", "pairs", [{"ask": f"Hello, {i}?", "good": "Hello!", "bad": "Go."}
                               for i in range(40)],
          parse=lambda row: Pair(({"role": "user", "content": row["ask"]},), row["good"],
                                 row["bad"]))
    pairs, counts = preference_pairs("manners", "test", 7)
    assert counts == {"read": 7, "kept": 7} and {pair.source for pair in pairs} == {"manners"}
    assert override(get_pipeline_preset("local-smoke"), {"dpo": {"sources": ["manners"]}})
    assert list(islice(training_texts("manners"), 3)) == ["Hello, 0?", "Hello!", "Go."]


def test_problems_in_one_entry(added):
    added("sums", "problems", [{"text": f"{i} and 1?", "number": f"{i + 1}"} for i in range(40)],
          parse=lambda row: Problem(row["text"], f"#### {row['number']}", 1, int(row["number"])))
    assert word_problems("sums", "test", 3)[2].value == 3
    assert instructions("sums", "train", 1)[0].kind == "problem"
    config = override(get_pipeline_preset("local-smoke"), {
        "verifier": {"problems": "sums"}, "eval": {"problems": "sums"}})
    assert data_names(config, "verifier") == ["sums"] and "sums" in data_names(config, "eval")


def test_sentences_in_one_entry(added):
    added("films", "sentences", [{"text": f"Film {i} is good.", "score": f"{i % 2}"}
                                 for i in range(40)],
          parse=lambda row: Review(row["text"], ("negative", "positive")[int(row["score"])]))
    assert [r.label for r in sentences("films", "test", 2)] == ["negative", "positive"]
    assert override(get_pipeline_preset("local-smoke"), {"eval": {"sentiment": "films"}})
    assert list(islice(documents("films"), 1)) == ["Film 0 is good.\n0"]


def test_a_parser_may_be_named_and_may_take_all_rows(added):
    info = added("trees", "chats", [{"message_id": "a", "role": "prompter", "text": "Hi?",
                                     "lang": "en"}],
                 parse="modern_llm.data.conversations:best_paths", parses_all=True)
    assert list(items("trees")) == [[{"role": "user", "content": "Hi?"}]] and info.parses_all


@pytest.mark.fault("messages")
def test_a_name_is_registered_once(added):
    info = added("kitchen", "chats", [{"ask": "A?", "say": "B."}], parse=chat)
    for change, message in (({}, "'kitchen' is taken"), ({"name": "text"}, "'text' is taken"),
                            ({"name": "glue/sst2"}, "is taken"), ({"name": "Own"}, "capital"),
                            ({"name": "own", "kind": "chat"}, "kind 'chat' is none of text, chats"),
                            ({"name": "own", "parse": ""}, "give parse="),
                            ({"name": "own", "kind": "text"}, "leave parse= out")):
        with pytest.raises(ValueError, match=message):
            register_dataset(replace(info, **change))


@pytest.mark.fault("messages")
@pytest.mark.parametrize("setting, name", [("dpo.sources", "alpaca"), ("dpo.sources", "kitchen"),
                                           ("sft.sources", "hh-rlhf"), ("eval.problems", "sst2"),
                                           ("verifier.problems", "kitchen"),
                                           ("dpo.replay_sources", "tinystories"),
                                           ("eval.sentiment", "kitchen")])
def test_a_data_set_of_another_kind_is_refused(added, setting, name):
    added("kitchen", "chats", [{"ask": "A?", "say": "B."}], parse=chat)
    kinds = {"dpo.sources": ("pairs",), "sft.sources": CHAT_KINDS, "eval.sentiment": ("sentences",),
             "dpo.replay_sources": CHAT_KINDS}.get(setting, ("problems",))
    section, _, field = setting.partition(".")
    value = [name] if field.endswith("sources") else name
    with pytest.raises(ConfigError, match=f"{setting}='?{name}'? is unknown") as refused:
        override(get_pipeline_preset("local-smoke"),
                 {section: {field: value, **({"weights": [1]} if section == "sft" else {})}})
    assert any(other in str(refused.value) for other in names_of(*kinds))
