"""Sources, tokenizers, token caches and packing: the edges that the chapters do not show."""

import gzip
import inspect
import json
import multiprocessing
import os
import string
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from modern_llm import cli
from modern_llm.config import DataConfig
from modern_llm.data import corpus, packing, reading, sources, splits, tokens
from modern_llm.data.sources import DataError, DatasetNotFound
from modern_llm.training.distributed import World

pytestmark = pytest.mark.usefixtures("offline")
STORIES = [f"Story {i}. " + f"The {'red' if i % 2 else 'old'} fox no {i} ran on. " * (1 + i % 23)
           for i in range(300)]


@pytest.fixture(scope="module")
def tokenizer():
    return tokens.train_tokenizer(STORIES, 300)


@pytest.fixture
def stories(tmp_path):
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES),
                    encoding="utf-8")
    return path


def build(path, tokenizer, tmp_path, split="train", **options):
    return corpus.build_token_cache(str(path), split, tokenizer, cache_dir=tmp_path / "cache",
                                     progress=False, **options)


# ---- tokenizers


def random_texts(count=200):
    rng = np.random.default_rng(0)
    for _ in range(count):
        codes = rng.integers(0, 0x110000, size=rng.integers(0, 40))
        yield "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)
        yield "".join(rng.choice(list(string.printable), size=rng.integers(0, 60)))


def test_any_unicode_text_comes_back(tokenizer):
    texts = [*random_texts(), "", " ", "  two  spaces ", "<|endoftext|> <|user|>",
             "e\u0301 é 👩‍👩‍👧 \u200d \x00 \r\n", "1999"]
    for text, ids in zip(texts, tokens.encode_documents(tokenizer, texts)):
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert not set(ids) & set(range(5))


def test_special_tokens_come_first_and_digits_stand_alone(tokenizer):
    assert ([tokenizer.token_to_id(token) for token in (tokens.END_OF_TEXT, *tokens.CHAT_TOKENS)]
            == [0, 1, 2, 3, 4])
    assert 261 < tokenizer.get_vocab_size() <= 300
    assert all(len(token) == 1 or not any(c.isdigit() for c in token)
               for token in tokenizer.get_vocab())
    assert tokenizer.encode("<|user|>a").ids[0] == 2


def test_training_a_tokenizer_is_deterministic(tokenizer):
    assert tokens.tokenizer_digest(tokens.train_tokenizer(
        iter(STORIES), 300)) == tokens.tokenizer_digest(tokenizer)


def test_transformers_reads_a_saved_tokenizer(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokens.save_tokenizer(tokenizer, tmp_path, chat_template="{{ messages[0]['content'] }}")
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "The old fox, no 17 <|end|>"
    assert (other(text)["input_ids"] == tokenizer.encode(text).ids
            == tokens.load_tokenizer(tmp_path).encode(text).ids)
    assert ((other.eos_token_id, other.bos_token, other.chat_template)
            == (0, tokens.END_OF_TEXT, "{{ messages[0]['content'] }}"))
    assert other.decode(other(text)["input_ids"]) == text


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path):
    with pytest.raises(DataError, match="no usable tokenizer in .*tokenizer.json"):
        tokens.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="no usable tokenizer"):
        tokens.load_tokenizer(tmp_path)
    with pytest.raises(DatasetNotFound, match="data.tokenizer='bpe'"):
        tokens.gpt2_tokenizer()


def test_make_tokenizer_trains_once(tmp_path, stories, monkeypatch):
    config = DataConfig(sources=(str(stories),), tokenizer_vocab_size=300)
    first = tokens.make_tokenizer(config, tmp_path)
    monkeypatch.setattr(tokens, "train_tokenizer", lambda *_: pytest.fail("trained again"))
    assert (tokens.tokenizer_digest(tokens.make_tokenizer(config, tmp_path))
            == tokens.tokenizer_digest(first))


# ---- sources


def test_names_aliases_and_near_misses():
    for name, want in (("roneneldan/TinyStories", "tinystories"), ("TinyStories", "tinystories"),
                       ("Salesforce/wikitext/wikitext-103-raw-v1", "wikitext-103-raw-v1"),
                       ("openai/gsm8k", "gsm8k")):
        assert sources.dataset_info(name).name == want
    with pytest.raises(DatasetNotFound, match="did you mean 'tinystories'"):
        sources.find_source("tinystorys")
    with pytest.raises(DatasetNotFound, match="no such file"):
        sources.find_source("/nowhere/a.txt")


def test_a_missing_data_set_says_what_was_tried():
    with pytest.raises(DatasetNotFound,
                       match="(?s)MODERN_LLM_DATA.*HF_HUB_OFFLINE is set.*Remedy.*local-smoke"):
        sources.find_source("gsm8k")


def test_the_hubs_cache_is_looked_for_where_the_library_keeps_it(tmp_path, monkeypatch):
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    info = sources.dataset_info("gsm8k")
    assert sources.hub_state(info) == "not cached, and HF_HUB_OFFLINE is set"
    (tmp_path / "huggingface" / "datasets" / "openai___gsm8k" / "main").mkdir(parents=True)
    assert sources.hub_state(info) == "cached"


def test_the_command_says_how_to_get_what_is_missing(monkeypatch):
    fetched = []
    monkeypatch.setattr(reading, "load_hub", lambda name, split: fetched.append((name, split)))
    asked = CliRunner().invoke(cli.main, ["datasets", "--download", "tinystories", "synthetic"])
    assert fetched == [("tinystories", "train"), ("tinystories", "validation")]
    assert (asked.exit_code == 1
            and "Missing: tinystories (MODERN_LLM_DATA is not set)." in asked.output), asked.output
    assert ("datasets --download NAME" in asked.output.replace("\n", " ")
            and asked.output.count("HF_HUB_OFFLINE") == 1)
    assert "Missing" not in CliRunner().invoke(cli.main, ["datasets", "synthetic"]).output
    both = CliRunner().invoke(cli.main, ["datasets", "--preset", "local-smoke", "gsm8k"])
    assert both.exit_code == 1 and "synthetic" in both.output and "Missing: gsm8k" in both.output
    refused = CliRunner().invoke(cli.main, ["datasets", "--download"])
    assert refused.exit_code == 2 and "needs the names" in refused.output


def test_checking_every_source_needs_neither_network_nor_torch():
    code = ("import sys; from modern_llm.data.sources import check_sources; rows = "
            "check_sources(); assert rows[0]['status'] == 'found' and rows[1]['status'] == "
            "'missing', rows; assert not {'torch', 'datasets', 'numpy'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)


CACHED = """
import json, sys
from pathlib import Path
home = Path(sys.argv[1])
(home / "a.jsonl").write_text("".join(json.dumps({"text": f"story {i}"}) + chr(10) for i in range(9)))
import datasets
datasets.load_dataset("json", data_files=str(home / "a.jsonl"))
made = next((home / "datasets/json").glob("default-*/*/*/dataset_info.json")).parent
place = home / "datasets/roneneldan___tiny_stories/default/0.0.0" / made.name
place.parent.mkdir(parents=True)
made.rename(place)
(place / "json-train.arrow").rename(place / "tiny_stories-train.arrow")
info = json.loads((place / "dataset_info.json").read_text())
info.update(builder_name="parquet", dataset_name="tiny_stories", config_name="default")
(place / "dataset_info.json").write_text(json.dumps(info))
from modern_llm.data import reading, sources
assert sources.check_sources(["tinystories"])[0]["where"] == "hub (cached)"
assert list(reading.documents("tinystories"))[:2] == ["story 0", "story 1"]
assert reading.content_id("tinystories") == reading.content_id("roneneldan/TinyStories")
try:
    next(reading.documents("tinystories", "validation"))
except sources.DatasetNotFound as error:
    assert "roneneldan/TinyStories could not be loaded" in str(error)
else:
    raise AssertionError("a split that was never downloaded was found")
"""


def test_the_copy_an_earlier_download_left_is_read_offline(tmp_path):
    """The layout of the hub's cache, made by hand: no network here or there."""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", CACHED, str(tmp_path)], check=True, timeout=120,
                   env=environment)


@pytest.mark.parametrize("name, text", [
    ("tinystories/train.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in STORIES)),
    ("tinystories/train.jsonl.gz", "".join(json.dumps({"text": text}) + "\n" for text in STORIES)),
    ("sst2/train.tsv.gz",
     "sentence\tlabel\n" + "".join(f'a "{text.strip()}\t1\n' for text in STORIES)),
    ("openwebtext/train.txt", "<|endoftext|>".join(STORIES)),
])
def test_generic_mirror_files(name, text, tmp_path, monkeypatch):
    path = tmp_path / name
    path.parent.mkdir()
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    monkeypatch.setenv("MODERN_LLM_DATA", str(tmp_path))
    source = name.split("/")[0]
    train, held = (list(reading.documents(source, split)) for split in ("train", "validation"))
    assert len(train) + len(held) == 300 and held and not set(train) & set(held)
    assert sources.check_sources([source])[0]["where"] == "mirror"


def test_null_is_a_word_in_a_tsv(tmp_path, monkeypatch):
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "dev.tsv").write_text("sentence\tlabel\nnull\t0\n")
    monkeypatch.setenv("MODERN_LLM_DATA", str(tmp_path))
    assert list(reading.rows("sst2", "validation")) == [{"sentence": "null", "label": "0"}]


def test_splits_that_nobody_stored_are_cut():
    plan = splits.split_plan
    assert plan(["train", "validation"], "train") == ("train", 0, 100)
    assert ([plan(["train"], split) for split in ("train", "validation")]
            == [("train", 2, 100), ("train", 0, 2)])
    assert plan(["train", "test"], "test") == ("test", 0, 100)
    assert ([plan(["test"], s)[1:] for s in ("test", "validation", "train")]
            == [(0, 10), (10, 12), (12, 100)])
    with pytest.raises(DataError, match="no 'test' split"):
        plan(["train"], "test")
    with pytest.raises(DataError, match="did you mean 'validation'"):
        plan(["train"], "validatoin")


def test_articles_with_and_without_blank_lines():
    spaced = ["", " = A = ", "", " one ", " = t / 2 = ", " two ", "", " = = S = = ", "", " three ",
              "", " = B = ", "", " x "]
    assert ([article.split("\n")[0].strip() for article in reading.articles(spaced)]
            == ["= A =", "= B ="])
    dense = [line for line in spaced if line and line != " = t / 2 = "]
    assert len(list(reading.articles(dense))) == 2
    assert list(reading.articles([])) == []


def test_paragraphs_of_a_plain_text_stay_together(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("\n\n".join(f"Paragraph {i} " + "word " * 100 for i in range(400)),
                    encoding="utf-8")
    train, held = (list(reading.documents(str(path), split)) for split in ("train", "validation"))
    assert held and sum(text.count("Paragraph") for text in train + held) == 400
    assert all(1900 < len(text) < 2700 for text in train)
    assert len(held) == 10 and len(train) == 90 and not set(train) & set(held)


BAD_FILES = [
    ("a.txt", b"", "the file is empty"),
    ("a.txt", b" \n \n", "the file is empty"),
    ("a.txt", b"\x7fELF\0\1", "a binary file"),
    ("a.txt", b"good\n" * 3 + b"caf\xe9\n", "line 4: byte 0xe9 at column 4 is not UTF-8"),
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: .* is not valid JSON"),
    ("a.jsonl", b'{"text": "a"}\n[1, 2]\n', "line 2: .* is not a JSON object"),
    ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2 has no field 'text'"),
    ("a.jsonl", b'{"story": "a"}\n', "line 1 has no field 'text', only .'story'."),
    ("a.jsonl.gz", b'{"text": "a"}\n', "cannot be read: Not a gzipped file"),
    ("a.jsonl.gz",
     gzip.compress(os.urandom(300_000).hex().encode())[:-90_000], "breaks off|cannot be read"),
    ("a.tsv", b"sentence\tlabel\na\t1\n", "line 2 has no field 'text'"),
]


@pytest.mark.parametrize("name, content, message", BAD_FILES)
def test_an_unusable_file_is_named_with_its_line(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        (list(reading.documents(str(path), "train"))
         and list(reading.documents(str(path), "validation")))
    assert str(path) in str(caught.value)


def test_characters_that_utf8_cannot_hold_are_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a \\ud83d b"}\n' * 2 + '{"text": "%s"}\n' % (20 * "a word "))
    assert list(reading.documents(str(path), "train"))[:2] == ["a \ufffd b"] * 2


# ---- token caches


def test_a_cache_holds_every_document(stories, tokenizer, tmp_path):
    cache = build(stories, tokenizer, tmp_path)
    texts = list(reading.documents(str(stories), "train"))
    assert len(cache) == len(texts) and cache.num_bytes == sum(len(text.encode()) for text in texts)
    assert [tokenizer.decode(cache[i][1:].tolist()) for i in range(len(cache))] == texts
    assert all(cache[i][0] == 0 for i in range(len(cache))) and cache.tokens[-1] == 0
    assert cache.floor_nats is None and cache.tokens.dtype == np.uint16
    head = cache.head(500)
    assert (head.num_tokens <= 500 < cache.head(10**9).num_tokens == cache.num_tokens
            and len(cache.head(1)) == 1)


def test_a_cache_is_reused_and_depends_on_content(stories, tokenizer, tmp_path, monkeypatch):
    first = build(stories, tokenizer, tmp_path)
    stamp = (first.folder / "tokens.bin").stat().st_mtime_ns
    assert (build(stories, tokenizer, tmp_path).folder / "tokens.bin").stat().st_mtime_ns == stamp
    others = [build(stories, tokenizer, tmp_path, max_tokens=1000),
              build(stories, tokenizer, tmp_path, "validation"),
              build(stories, tokens.train_tokenizer(STORIES, 280), tmp_path)]
    stories.write_text(stories.read_text() + '{"text": "one more"}\n')
    others.append(build(stories, tokenizer, tmp_path))
    assert len({cache.fingerprint for cache in [first, *others]}) == 5
    assert others[0].num_tokens <= 1000


def test_damage_is_noticed_and_mended(stories, tokenizer, tmp_path):
    cache = build(stories, tokenizer, tmp_path)
    whole = (cache.folder / "tokens.bin").read_bytes()
    for damage, options in ((whole[:-10], {}), (whole[:-2] + b"zz", {"verify": True})):
        (cache.folder / "tokens.bin").write_bytes(damage)
        with pytest.warns(UserWarning, match="damaged and is built again"):
            build(stories, tokenizer, tmp_path, **options)
        assert (cache.folder / "tokens.bin").read_bytes() == whole
    (cache.folder / "meta.json").write_text("{")
    with pytest.warns(UserWarning, match="damaged"):
        build(stories, tokenizer, tmp_path)


def _build_in_process(path, folder):
    cache = corpus.build_token_cache(
        path, "train", tokens.train_tokenizer(STORIES, 300), cache_dir=folder, progress=False)
    assert cache.num_tokens > 0


def test_two_builders_at_once(stories, tokenizer, tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_build_in_process, args=(str(stories), str(tmp_path / "cache")))
        for _ in range(2)]
    [worker.start() for worker in workers]
    [worker.join(120) for worker in workers]
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len([p for p in (tmp_path / "cache").iterdir() if not p.name.startswith(".")]) == 1
    assert build(stories, tokenizer, tmp_path, verify=True)


def test_a_failed_build_leaves_nothing(stories, tokenizer, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus, "_write_cache", full_disk)
    with pytest.raises(DataError, match="No space left on device; set MODERN_LLM_CACHE"):
        build(stories, tokenizer, tmp_path)
    assert [p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")] == []
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="MODERN_LLM_CACHE"):
        corpus.build_token_cache(str(stories), "train", tokenizer,
                                  cache_dir=tmp_path / "file" / "x", progress=False)


def test_long_documents_are_encoded_as_a_whole_would_be(tokenizer):
    text = " ".join(STORIES)
    pieces = tokens._cut_points(text, 100)
    assert "".join(pieces) == text and len(pieces) > 100 and max(map(len, pieces)) <= 200
    ids = tokens.encode_documents(tokenizer, pieces)
    assert [token for piece in ids for token in piece] == tokenizer.encode(text).ids
    assert list(map(len, tokens._cut_points("x" * 450, 100))) == [100, 100, 100, 150]
    [(ids, size, _)] = tokens.encoded([("é" + text, 0.0)], tokenizer)
    assert tokenizer.decode(ids) == "é" + text and size == len(text) + 2


# ---- packing


def naive_best_fit(lengths, capacity):
    room = []
    for length in lengths:
        fitting = [left for left in room if left >= length]
        if fitting:
            room[room.index(min(fitting))] -= length
        else:
            room.append(capacity - length)
    return sorted(room)


def test_best_fit_is_the_naive_best_fit():
    for seed in range(20):
        lengths = np.random.default_rng(seed).integers(1, 51, size=300)
        rows = packing.pack_documents(lengths, 50, np.random.default_rng(seed).permutation(300))
        fill = np.bincount(rows, weights=lengths)
        assert sorted(50 - fill) == naive_best_fit(sorted(lengths, reverse=True), 50)
    assert packing.pack_documents(np.array([], dtype=int), 8).tolist() == []
    with pytest.raises(DataError, match="must lie in 1 to capacity=50"):
        packing.pack_documents(np.array([1, 51]), 50)


@pytest.mark.parametrize("target", [0.0, 0.9, 0.97, 1.0])
def test_row_pattern_loses_nothing_and_reaches_its_density(target):
    for seed in range(10):
        lengths = np.sort(np.random.default_rng(seed).integers(1, 101, size=400))[::-1]
        parts = packing.row_pattern(lengths, 100, target)
        covered = [np.zeros(length, dtype=int) for length in lengths]
        for document, offset, length in zip(parts["document"], parts["offset"], parts["length"]):
            covered[document][offset:offset + length] += 1
        assert all((marks == 1).all() for marks in covered)
        fill = np.bincount(parts["row"], weights=parts["length"])
        assert fill.min() > 0 and fill.max() <= 100
        assert lengths.sum() / (100 * len(fill)) > min(target, 0.999) - 0.01


@pytest.fixture
def cache(stories, tokenizer, tmp_path):
    return build(stories, tokenizer, tmp_path)


@pytest.mark.parametrize("context, density", [(16, 0.97), (64, 0.97), (64, 0.0), (4096, 0.97)])
def test_an_epoch_scores_every_token_once(cache, context, density):
    batches = packing.PackedBatches([cache], context, 1, seed=1, min_density=density)
    seen = []
    for step in range(batches.rows_per_epoch):
        batch = batches(step)
        inputs, labels, segments = (
            batch[name][0] for name in ("input_ids", "labels", "segment_ids"))
        assert batch["labels"].dtype == torch.int64 and batch["labels"].shape == (1, context)
        assert ((labels == -100) == (segments == 0)).all() and segments[0] == 1
        same = segments[1:] * (segments[1:] == segments[:-1])
        assert (labels[:-1][same > 0] == inputs[1:][same > 0]).all()
        seen += list(zip(inputs[segments > 0].tolist(), labels[segments > 0].tolist()))
    assert sorted(seen) == sorted(zip(cache.tokens[:-1].tolist(), cache.tokens[1:].tolist()))


def test_batches_are_a_pure_function(cache):
    one = packing.PackedBatches([cache, cache], 64, 8, seed=3)
    steps = [7, 0, 2 * one.rows_per_epoch // 8, 7]  # across the end of epochs
    batches = [one(step) for step in steps]
    assert all(torch.equal(batches[0][k], batches[3][k]) for k in batches[0])
    assert not torch.equal(packing.PackedBatches([cache, cache], 64, 8, seed=4)(0)["input_ids"],
                           batches[1]["input_ids"])
    with pytest.raises(DataError, match="batch_size=0 must be at least 1"):
        packing.PackedBatches([cache], 64, 0)


@pytest.mark.fault("promises")
def test_ranks_are_shared_out_in_one_place(cache):
    """`World.shard` cuts a batch for the ranks; the batches themselves know nothing of them."""
    parameters = inspect.signature(packing.PackedBatches).parameters
    assert list(parameters) == ["caches", "context_length", "batch_size", "seed", "min_density"]
    batch = packing.PackedBatches([cache], 64, 8, seed=3)(1)
    shares = [World(rank, 4).shard(batch) for rank in range(4)]
    assert all(torch.equal(torch.cat([share[name] for share in shares]), batch[name])
               for name in batch)


def test_validation_scores_every_token_once(cache):
    batches = list(packing.validation_batches(cache, 64, 8))
    labels = torch.cat([batch["labels"].flatten() for batch in batches])
    assert sorted(labels[labels >= 0].tolist()) == sorted(cache.tokens[1:].tolist())
    part = sum(int((batch["labels"] >= 0).sum())
               for batch in packing.validation_batches(cache, 64, 8, 1000))
    assert part == cache.head(1000).num_tokens <= 1000


def test_caches_of_different_tokenizers_do_not_mix(cache, stories, tmp_path):
    other = build(stories, tokens.train_tokenizer(STORIES, 280), tmp_path)
    with pytest.raises(DataError, match="different tokenizers"):
        packing.PackedBatches([cache, other], 64, 8)


def test_a_corpus_of_the_built_in_world(tmp_path):
    config = DataConfig(max_train_tokens=20_000, max_validation_tokens=5_000)
    tokenizer = tokens.make_tokenizer(config, tmp_path)
    train, held_out = corpus.load_corpus(config, tokenizer, tmp_path, progress=False)
    card = corpus.data_card([*train, *held_out.values()])
    assert card["split"].tolist() == ["train", "validation"] and card["tokens"].max() <= 20_000
    assert 0.1 < packing.bits_per_byte(held_out["synthetic"].floor_nats,
                                       held_out["synthetic"].num_bytes) < 3


# ---- the real files


def test_a_real_mirror(tmp_path, monkeypatch):
    root = MIRROR
    if not root:
        pytest.skip("MODERN_LLM_DATA is not set: no mirror of real data to read")
    monkeypatch.setenv("MODERN_LLM_DATA", root)
    present = {row["name"] for row in sources.check_sources() if row["where"] == "mirror"}
    if (not {"wikitext-2-raw-v1", "tinystories"} <= present
            or not (Path(root) / "gpt2_tokenizer").is_dir()):
        pytest.skip(f"the mirror has only {sorted(present)}")
    gpt2 = tokens.gpt2_tokenizer()
    assert (gpt2.encode("Hello world<|user|>").ids == [15496, 995, 50258]
            and gpt2.get_vocab_size() == 50261)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        caches = {name: corpus.build_token_cache(name, "validation", gpt2, 300_000, tmp_path,
                                                  progress=False)
                  for name in ("wikitext-2-raw-v1", "tinystories")}
    assert (corpus.data_card(caches.values())["note"].tolist()
            == [sources.DATASET_REGISTRY["wikitext-2-raw-v1"].note, ""])
    assert (len(caches["wikitext-2-raw-v1"]) == 60
            and 240_000 < caches["wikitext-2-raw-v1"].num_tokens < 262_000)
    batches = packing.PackedBatches(list(caches.values()), 256, 8)
    assert batches.density >= 0.97
    for name, fields in (("gsm8k", {"question", "answer"}),
                         ("sst2", {"sentence", "label"}), ("alpaca", {"instruction", "output"}),
                         ("hh-rlhf", {"chosen", "rejected"})):
        if name in present:
            assert fields <= set(next(reading.rows(name, "train")))


MIRROR = os.environ.get("MODERN_LLM_DATA", "")
