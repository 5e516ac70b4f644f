"""The four protocols of perplexity: every token once, the field's windows, texts joined and cut as
the protocol says.
"""

import itertools
import json
import math
import os
import re

import numpy as np
import pandas as pd
import pytest
import torch

from modern_llm.config import ModelConfig
from modern_llm.data.reading import documents
from modern_llm.data.tokens import end_of_text_id, train_tokenizer
from modern_llm.evaluation import perplexity
from modern_llm.evaluation.held_out import (
    blank_lines, cut_texts, detokenise, held_out_pages, joined_tokens, scored_split,
    wikitext_pages,
)
from modern_llm.evaluation.perplexity import (
    perplexity_tables, protocol_rows, score_documents, score_joined, score_lines, sequence_nats,
    token_nats, windows,
)
from modern_llm.files import write_json
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.statistics import held_out_measures, perplexity_ratio

VOCAB = 400
HAS_DATA = bool(os.environ.get("MODERN_LLM_DATA"))


def tiny(context_length=16, std=0.3, vocab_size=VOCAB):
    torch.manual_seed(0)
    model = ModernDecoderLM(
        ModelConfig(vocab_size=vocab_size, width=32, num_layers=2, num_heads=2, num_kv_heads=1,
                    ffn_width=64, context_length=context_length))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(itertools.islice(documents("synthetic"), 100), VOCAB)


@pytest.fixture(scope="module")
def texts():
    return list(itertools.islice(documents("synthetic", "validation"), 12))


def uniform(context_length=16):
    model = tiny(context_length)
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


@torch.no_grad()
def log_prob(model, context, continuation):
    """Sum of log p of a continuation behind a context: one plain forward pass."""
    ids = torch.tensor([*context, *continuation])
    logits = model(ids[None, :-1])[0].log_softmax(-1)
    return float(logits[len(context) - 1:].gather(-1, ids[len(context):, None]).sum())


def harness_pairs(tokens, prefix, size, overlap):
    """(context, continuation) pairs as lm-evaluation-harness makes them: `overlap` is its
    context_len.
    """
    pairs, done = [([prefix], list(tokens[:size]))], min(size, len(tokens))
    while done < len(tokens):
        take = min(len(tokens) - done, size - overlap + 1)
        end = done + take
        pairs.append((list(tokens[end - size - 1:done]), list(tokens[done:end])))
        done = end
    return pairs


def test_every_token_is_scored_once():
    for length, context in itertools.product((1, 2, 3, 7, 16, 17, 31, 32, 33, 34, 100, 257),
                                             (2, 3, 8, 16, 31, 32, 64)):
        for stride in range(1, context + 1):
            plan = windows(length, context, stride)
            assert ([i for begin, end, first in plan for i in range(first, end)]
                    == list(range(1, length)))
            assert all(begin < first and end - begin <= context + 1 for begin, end, first in plan)
            if length > context:
                assert all(end - begin == context + 1 for begin, end, _ in plan)


@pytest.mark.parametrize("length,context,stride",
                         [(5, 8, 8), (8, 8, 8), (9, 8, 8), (30, 8, 8), (41, 8, 3), (40, 8, 1)])
def test_windows_of_the_harness(length, context, stride):
    tokens = list(range(100, 100 + length))
    stream = [7, *tokens]
    ours = [(stream[begin:first], stream[first:end])
            for begin, end, first in windows(length + 1, context, stride)]
    assert ours == harness_pairs(tokens, 7, context, context - stride + 1)


def test_windows_refuse():
    for arguments, word in (((0, 8, 8), "no tokens"), ((9, 1, 1), "context of 1"),
                            ((9, 8, 0), "stride=0"), ((9, 8, 9), "stride=9")):
        with pytest.raises(ValueError, match=word):
            windows(*arguments)


def test_token_nats_against_plain_forward_passes():
    model = tiny()
    model.train()
    ids = torch.randint(VOCAB, (53,)).tolist()
    for stride in (16, 9, 1):
        found = token_nats(model, ids, stride=stride, prefix_id=3)
        plan = windows(54, 16, stride)
        stream = [3, *ids]
        wanted = [-log_prob(model, stream[begin:i], stream[i:i + 1]) for begin, end, first in plan
                  for i in range(first, end)]
        assert np.allclose(found, wanted, atol=1e-4)
    assert model.training
    short = token_nats(model, ids[:10])
    assert (math.isnan(short[0])
            and short[1:].sum() == pytest.approx(-log_prob(model, ids[:1], ids[1:10]), abs=1e-4))


def test_batches_chunks_and_shared_strides_change_nothing(monkeypatch):
    model, ids = tiny(), torch.randint(VOCAB, (90,)).tolist()
    whole = token_nats(model, ids, stride=8)
    calls = []
    plain = model.hidden
    monkeypatch.setattr(model, "hidden", lambda x: (calls.append(x.numel()), plain(x))[1])
    shared = sequence_nats(model, [ids, ids[:5], ids[:2]], strides=(16, 8), batch_rows=3)
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", 3 * VOCAB)
    assert np.allclose(shared[0][1], token_nats(model, ids, stride=8, batch_rows=1), atol=1e-5,
                       equal_nan=True)
    assert np.allclose(shared[0], [token_nats(model, ids, stride=16), whole], atol=1e-5,
                       equal_nan=True)
    assert np.allclose(shared[1][0], token_nats(model, ids[:5]), atol=1e-5, equal_nan=True)
    read = sum(end - begin - 1
               for begin, end in {(b, e) for s in (16, 8) for b, e, _ in windows(90, 16, s)})
    separate = sum(end - begin - 1 for s in (16, 8) for begin, end, _ in windows(90, 16, s))
    assert read < 0.75 * separate


def test_bad_input(tokenizer):
    model = tiny()
    with pytest.raises(ValueError, match="token 400, outside"):
        token_nats(model, [1, VOCAB])
    with pytest.raises(ValueError, match="token -1, outside"):
        token_nats(model, [1, -1])
    with pytest.raises(ValueError, match="no tokens"):
        token_nats(model, [])
    with pytest.raises(ValueError, match="no tokens"):
        token_nats(model, [], prefix_id=0)
    with pytest.raises(ValueError, match="exceeds the model's 16"):
        token_nats(model, [1, 2], context_length=17)
    with pytest.raises(ValueError, match="none of 2 documents has a word"):
        score_documents(model, tokenizer, ["", " \n"])
    with pytest.raises(ValueError, match="none of 0 lines"):
        score_lines(model, tokenizer, ["", "  "])
    with pytest.raises(ValueError, match="'T4' is unknown"):
        perplexity_tables(model, tokenizer, "synthetic", 100, protocols=("T4",))
    with pytest.raises(ValueError, match="endless"):
        perplexity_tables(model, tokenizer, "synthetic")
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite"):
        token_nats(model, [1, 2, 3])


def test_uniform_model_in_every_protocol(tokenizer):
    tables = perplexity_tables(uniform(), tokenizer, "synthetic", max_tokens=1500)
    assert list(tables) == ["T0", "T1", "T2", "T3"]
    for table in tables.values():
        assert np.allclose(table.nats, table.tokens * math.log(VOCAB), rtol=1e-6)
    assert (tables["T1"].tokens.sum() == tables["T2"].tokens.sum() == 1499
            and 1400 < tables["T3"].tokens.sum() <= 1500)
    rows = {row["metric"]: row for row in protocol_rows(tables, "synthetic")}
    assert ([rows[f"perplexity {p}, synthetic"]["value"] for p in ("T0", "T1", "T2")]
            == pytest.approx([VOCAB] * 3, rel=1e-5))
    ratio = tables["T3"].tokens.sum() / tables["T3"].bytes.sum()
    assert (rows["bits per byte T3, synthetic"]["value"]
            == pytest.approx(ratio * math.log2(VOCAB), rel=1e-5))
    assert all(row["low"] <= row["value"] <= row["high"] and row["n"] > 5
               and row["metric"].split()[-2][:2] in row["protocol"] for row in rows.values())
    assert ("stride 8" in rows["perplexity T2, synthetic"]["protocol"]
            and "context 16" in rows["perplexity T1, synthetic"]["protocol"])


def test_documents_as_the_harness_scores_them(tokenizer, texts):
    """Word perplexity, byte perplexity and bits per byte against a small version of the harness'
    own computation.
    """
    model, end = tiny(), end_of_text_id(tokenizer)
    table = score_documents(model, tokenizer, texts)
    log_likelihoods, words, num_bytes = [], 0, 0
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        log_likelihoods.append(
            sum(log_prob(model, *pair) for pair in harness_pairs(ids, end, 16, 1)))
        words += len(re.split(r"\s+", text))
        num_bytes += len(text.encode("utf-8"))
    assert (np.allclose(table.nats, -np.array(log_likelihoods), rtol=1e-5)
            and table.words.sum() == words)
    values = [row["value"] for row in protocol_rows({"T3": table}, "x")]
    total = -sum(log_likelihoods)
    assert values == pytest.approx([math.exp(total / words), math.exp(total / num_bytes),
                                    total / num_bytes / math.log(2)], rel=1e-4)


def test_wordless_documents_are_counted(tokenizer, texts):
    table = score_documents(tiny(), tokenizer, [texts[0], "\n \n", texts[1]])
    assert len(table) == 2 and "documents without words left out: 1" in table.setting[0]


def test_stream_of_documents(tokenizer, texts):
    ids, owners = joined_tokens(tokenizer, texts)
    end = end_of_text_id(tokenizer)
    assert (ids[0] == ids[-1] == end and (ids == end).sum() == len(texts) + 1
            and owners.max() == len(texts) - 1)
    assert [tokenizer.decode(ids[owners == i].tolist()) for i in range(len(texts))] == texts
    cut, cut_owners = joined_tokens(tokenizer, texts, 50)
    assert (cut == ids[:50]).all() and (cut_owners == owners[:50]).all()
    forged, _ = joined_tokens(tokenizer, ["a <|endoftext|> b"])
    assert (forged == end).sum() == 2
    one, two = score_joined(tiny(), tokenizer, ids, owners)
    assert (one.tokens.sum() == two.tokens.sum() == len(ids) - 1
            and (one.words == [len(re.split(r"\s+", t)) for t in texts]).all())


def test_a_limit_cuts_behind_a_word(tokenizer, texts):
    for limit in (1, 7, 60, 200):
        kept = cut_texts(tokenizer, texts, limit)
        sizes = [len(tokenizer.encode(text).ids) for text in kept]
        assert (sum(sizes) <= limit
                and all(whole.startswith(part) for whole, part in zip(texts, kept)))
        assert all(text.split() == texts[i].split()[:len(text.split())]
                   for i, text in enumerate(kept))
    assert cut_texts(tokenizer, texts, None) == texts


def test_lines_are_scored_alone_and_cut(tokenizer):
    model = tiny()
    table = score_lines(model, tokenizer,
                        ["", "The cat sat on the mat and looked at the dog that looked at the cat.",
                         "  ", "A dog."] * 80)
    assert (len(table) == 100 and table.tokens.max() == 15
            and table.nats.iloc[0] == pytest.approx(table.nats.iloc[2]))
    ids = tokenizer.encode("A dog.").ids
    assert table.nats.iloc[1] == pytest.approx(-log_prob(model, ids[:1], ids[1:]), abs=1e-4)


PAGE = [" ", " = Robert Boulter = ", " ", " He is an actor . ", " ", " = = Career = = ",
        " ", " A chain of <formula> filters ", " = 1 rad / s = ", " 1 henry . ", " ", " ",
        " = Dick Rifenburg = ", " ", " A diver , born in 1 @,@ 926 . "]


def test_wikitext_pages_and_blank_lines(tokenizer):
    pages = wikitext_pages(PAGE)
    assert ([page.split("\n")[0] for page in pages]
            == [" = Robert Boulter = ", " = Dick Rifenburg = "])
    assert "\n".join(pages) == "\n".join(PAGE[1:])
    bare = [line for line in PAGE if line.strip()]
    assert wikitext_pages(bare) == pages and blank_lines(PAGE) == PAGE
    ids, owners = joined_tokens(tokenizer, pages, wikitext=True)
    rows = [f"{line}\n" if line.strip() else "" for line in PAGE]
    assert tokenizer.decode(ids.tolist()) == "\n\n".join(rows) and set(owners) == {0, 1}
    assert tokenizer.decode(ids[owners == 1].tolist()).strip().startswith("= Dick")


def test_detokenise_undoes_the_spacing():
    assert (detokenise(" a @-@ b ( c ) , d 's [ e ] \" f \" { g } 1 @.@ 5 \n h ")
            == " a-b (c), d's [e] \"f\" {g} 1.5\nh ")


def test_own_file(tmp_path, tokenizer):
    path = tmp_path / "notes.txt"
    path.write_text(
        "<|endoftext|>".join(f"Note {i} says that {i} is a number.\nIt ends." for i in range(300)),
        encoding="utf-8")
    tables = perplexity_tables(uniform(), tokenizer, str(path), max_tokens=200)
    assert (set(tables) == set(perplexity.PROTOCOLS)
            and all(t.setting[0].startswith("validation split") for t in tables.values()))


def test_wikitext_from_a_mirror(tmp_path, monkeypatch, tokenizer):
    folder = tmp_path / "wikitext103"
    folder.mkdir()
    for name, repeats in (("train", 1), ("valid", 30), ("test", 3)):
        (folder / f"wiki.{name}.raw").write_text("\n".join(PAGE * repeats) + "\n", encoding="utf-8")
    monkeypatch.setenv("MODERN_LLM_DATA", str(tmp_path))
    tables = perplexity_tables(uniform(32), tokenizer, "wikitext-103")
    assert (scored_split("wikitext-103") == "test" and len(tables["T0"]) == 100
            and len(tables["T1"]) == len(tables["T3"]) == 6)
    assert "rows joined by blank lines; context 32, stride 16" in tables["T2"].setting[0]
    pages = wikitext_pages(PAGE)
    assert (tables["T3"].words[:2].tolist()
            == [len(re.split(r"\s+", page)) for page in pages[:1] + [pages[1] + "\n "]])
    ids = [tokenizer.encode(detokenise(page)).ids for page in pages]
    assert tables["T3"].tokens[0] == len(ids[0])
    assert all(np.allclose(t.nats, t.tokens * math.log(VOCAB)) for t in tables.values())


@pytest.mark.skipif(not HAS_DATA, reason="MODERN_LLM_DATA is not set: no WikiText here")
def test_wikitext_is_the_original_text():
    """60 articles and, with GPT-2's tokenizer, the token count that every user of this test set
    knows.
    """
    from modern_llm.data.tokens import gpt2_tokenizer

    pages = list(held_out_pages("wikitext-2", scored_split("wikitext-2")))
    ids, owners = joined_tokens(gpt2_tokenizer(), pages, wikitext=True)
    assert len(pages) == owners.max() + 1 == 60 and len(ids) == 287_644


@pytest.mark.fault("one-lacks")
@pytest.mark.parametrize("nats", [800.0, 1e6, math.inf, math.nan])
def test_a_perplexity_too_large_for_a_number_is_not_known(nats, tmp_path):
    table = pd.DataFrame({"document": [0, 1], "nats": [nats, nats],
                          "tokens": [1, 1], "words": [1, 1], "bytes": [1, 1], "setting": "s"})
    rows = [*protocol_rows({"T1": table, "T3": table}, "here"),
            *held_out_measures(table, 2, "here"),
            {"metric": "tax", **perplexity_ratio(table.assign(nats=0.0), table)}]
    read = json.loads(write_json(tmp_path / "rows.json", rows).read_text(),
                      parse_constant=pytest.fail)
    assert all(row["value"] is None for row in read
               if "perplexity" in row["metric"] or row["metric"] == "tax")
    assert all((row["value"] is None) == (not math.isfinite(nats)) for row in read
               if "bits" in row["metric"] or "nats" in row["metric"])
