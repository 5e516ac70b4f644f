"""The same checkpoint scored by lm-evaluation-harness: the same perplexities, the same
log-likelihoods of labels and sentences.

The harness opens our folder as a Hugging Face one, tokenises with transformers and cuts windows
itself. Set MODERN_LLM_AGREEMENT to a checkpoint folder, and MODERN_LLM_DATA, to compare a real
model on WikiText-2 and SST-2.
"""

import itertools
import logging
import math
import os

import numpy as np
import pytest
import torch

from modern_llm.config import ModelConfig
from modern_llm.data import synth
from modern_llm.data.synth import LABELS
from modern_llm.data.tasks import sentences
from modern_llm.data.tokens import (
    END_OF_TEXT, encode_documents, end_of_text_id, save_tokenizer, train_tokenizer,
)
from modern_llm.evaluation.fewshot import (
    channel_suffix, draw_demonstrations, encode_prompts, label_log_probs, prompt_prefix,
    prompt_suffix,
)
from modern_llm.evaluation.held_out import cut_texts, detokenise, held_out_pages
from modern_llm.evaluation.perplexity import protocol_rows, score_documents
from modern_llm.interchange.hub import load
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.prefix import continuation_log_probs
from modern_llm.models.saving import save_model
from modern_llm.report.card import export_with_card

for needed in ("transformers", "lm_eval"):
    pytest.importorskip(needed, reason="the peer's figures: pip install 'modern_llm[agreement]'")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.metrics import bits_per_byte, weighted_perplexity  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer  # noqa: E402

CONTEXT = 512
CLOSE = {"rtol": 1e-5, "atol": 1e-4}  # nats; the labels of a random model differ by whole nats
FAMILIES = {"llama": {"use_qk_norm": False},
            "qwen3": {"num_heads": 4, "num_kv_heads": 2, "tie_embeddings": False}}
# what the tokenizer is trained on
LABEL_WORDS = {"whole labels": ["review"], "labels in pieces": ["story", "problem"]}
SEPARATORS = {"end of text": None, "blank line": "\n\n"}


class Peer:
    """lm-evaluation-harness over a folder."""

    def __init__(self, folder, context_length, batch_size=4):
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.model = HFLM(pretrained=str(folder), device="cpu", dtype="float32",
                          max_length=context_length, batch_size=batch_size)

    def log_likelihoods(self, pairs):
        """log p of the continuation of every (context, continuation)."""
        requests = [Instance("loglikelihood", {}, pair, number)
                    for number, pair in enumerate(pairs)]
        return np.array(
            [value for value, _ in self.model.loglikelihood(requests, disable_tqdm=True)])

    def perplexities(self, pages, transform=None):
        """Word and byte perplexity and bits per byte of documents, from the harness' own windows,
        counts and means.
        """
        texts = [transform(page) if transform else page for page in pages]
        requests = [Instance("loglikelihood_rolling", {}, (text,), number)
                    for number, text in enumerate(texts)]
        sums = self.model.loglikelihood_rolling(requests, disable_tqdm=True)
        found = [process_results({"page": page}, (value,)) for page, value in zip(pages, sums)]
        forms = {"word_perplexity": weighted_perplexity, "byte_perplexity": weighted_perplexity,
                 "bits_per_byte": bits_per_byte}
        return (np.array([form([one[name] for one in found]) for name, form in forms.items()]),
                -np.array(sums))


def perplexities(model, tokenizer, pages, context_length, transform=None):
    """The same three figures, and the nats of each document, from this package."""
    table = score_documents(model, tokenizer, pages, context_length, transform)
    return (np.array([row["value"] for row in protocol_rows({"T3": table}, "pages")]),
            table.nats.to_numpy())


def prompt_text(demonstrations, text, separator):
    """A prompt as one string for the harness; its tokenizer reads <|endoftext|> as the token."""
    parts = [*prompt_prefix(demonstrations), prompt_suffix(text)]
    return (separator.join(parts) if separator is not None
            else "".join(END_OF_TEXT + part for part in parts))


def label_pairs(demonstrations, texts, separator):
    return [(prompt_text(demonstrations, text, separator), f" {label}") for text in texts
            for label in LABELS]


@pytest.fixture(scope="module", params=LABEL_WORDS)
def tokenizer(request):
    """One in which a label word is one token, and one in which it is several."""
    kinds = LABEL_WORDS[request.param]
    made = train_tokenizer(
        (d.text for d in itertools.islice(synth.documents(kinds=kinds), 500)), 400)
    sizes = {len(ids) for ids in encode_documents(made, [f" {label}" for label in LABELS])}
    assert (sizes == {1}) == (kinds == ["review"])
    return made


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tokenizer, tmp_path_factory):
    """Our model and the harness over the folder that it was saved in."""
    torch.manual_seed(0)
    values = {"vocab_size": tokenizer.get_vocab_size(), "context_length": CONTEXT, "width": 32,
              "num_layers": 2, "num_heads": 2, "ffn_width": 64}
    model = ModernDecoderLM(ModelConfig(**{**values, **FAMILIES[request.param]})).eval()
    for name, parameter in model.named_parameters():
        (torch.nn.init.uniform_(parameter, 0.5, 1.5) if "norm" in name
         else torch.nn.init.normal_(parameter, std=0.25))
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, model, end_of_text_id(tokenizer))
    save_tokenizer(tokenizer, folder)
    return model, Peer(folder, CONTEXT)


def test_an_export_scores_as_the_checkpoint_does(both, tokenizer, pages, tmp_path):
    """In shards, with the config and the generation settings that others read."""
    model, peer = both
    export_with_card(peer.model.model.config._name_or_path, tmp_path / "exported", shard_gb=4e-5)
    exported = Peer(tmp_path / "exported", CONTEXT)
    assert len(list((tmp_path / "exported").glob("model-*.safetensors"))) > 1
    np.testing.assert_allclose(exported.perplexities(pages)[1],
                               perplexities(model, tokenizer, pages, CONTEXT)[1], **CLOSE)
    texts = [review.text for review in sentences("synthetic", "test", 4)]
    demonstrations = draw_demonstrations(sentences("synthetic", "train", 60), 1, 1)[0]
    found = exported.log_likelihoods(label_pairs(demonstrations, texts, None)).reshape(-1, 2)
    np.testing.assert_allclose(
        label_log_probs(model, tokenizer, demonstrations, texts, separator=None), found, **CLOSE)


@pytest.fixture(scope="module")
def pages():
    """Documents of less than one window, exactly one, and several; white space around some, and
    other scripts.
    """
    texts = list(itertools.islice((d.text for d in synth.documents("heldout")), 8))
    return ["One.", *texts, " \n" + texts[0], texts[1] + " \n\n",
            "\n".join(texts), "Zürich, 東京 — 3 × 4 = 12 🙂"]


def test_perplexities_of_documents(both, tokenizer, pages):
    model, peer = both
    lengths = list(map(len, encode_documents(tokenizer, pages)))
    assert min(lengths) < 50 and max(lengths) > CONTEXT
    for context in (CONTEXT, 50, sorted(lengths)[len(lengths) // 2]):
        peer.model._max_length = context
        ours, theirs = perplexities(model, tokenizer, pages, context), peer.perplexities(pages)
        np.testing.assert_allclose(ours[1], theirs[1], **CLOSE)
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
        assert ours[0][2] == pytest.approx(
            theirs[1].sum() / math.log(2) / sum(len(page.encode()) for page in pages), rel=1e-5)
    peer.model._max_length = CONTEXT


def test_wikitext_is_scored_in_ordinary_spacing(both, tokenizer):
    model, peer = both
    pages = [" = A @-@ side ( 1995 ) = \n \n The \" best \" of 3 @,@ 500 , it 's said ; see [ 2 ] "
             ". \n = = Notes = = \n \n 5 ° N of here , \' so \' .\n",
             " = B = \n Words ' own : { x } ! Is it ? Yes . \n"]
    spaced = lambda page: wikitext_detokenizer({"page": page})
    assert ([detokenise(page) for page in pages] == [spaced(page) for page in pages]
            and spaced(pages[0]) != pages[0])
    ours, theirs = (perplexities(model, tokenizer, pages, CONTEXT, detokenise),
                    peer.perplexities(pages, spaced))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)


@pytest.mark.parametrize("separator", SEPARATORS.values(), ids=SEPARATORS)
def test_labels_behind_demonstrations(both, tokenizer, separator):
    model, peer = both
    texts = [review.text for review in sentences("synthetic", "test", 12)]
    for shots in (0, 1, 2):
        demonstrations = draw_demonstrations(sentences("synthetic", "train", 60), shots, 1)[0]
        prompts = encode_prompts(
            tokenizer, [[*prompt_prefix(demonstrations), prompt_suffix(text)] for text in texts],
            separator)
        # longer ones: the harness cuts, we drop demonstrations
        fits = [i for i, ids in enumerate(prompts) if len(ids) + 10 <= CONTEXT]
        assert len(fits) > 5
        ours = label_log_probs(model, tokenizer, demonstrations,
                               [texts[i] for i in fits], separator=separator, batch_rows=5)
        theirs = peer.log_likelihoods(label_pairs(
            demonstrations, [texts[i] for i in fits], separator)).reshape(-1, 2)
        np.testing.assert_allclose(ours, theirs, **CLOSE)
        assert ours.std() > 0.1 and (ours.argmax(1) == theirs.argmax(1)).all()


def test_sentences_behind_labels(both, tokenizer):
    """The channel: a long continuation, and no context at all."""
    model, peer = both
    texts = [review.text for review in sentences("synthetic", "test", 12)]
    contexts = [END_OF_TEXT + channel_suffix(label) for label in LABELS]
    tails, opening = (encode_documents(tokenizer, [f" {text}" for text in texts]),
                      end_of_text_id(tokenizer))
    for context, label in zip(contexts, LABELS):
        start = [opening, *encode_documents(tokenizer, [channel_suffix(label)])[0]]
        ours = continuation_log_probs(model, [[*start, *tail] for tail in tails],
                                      [len(start)] * len(tails), batch_rows=5)
        np.testing.assert_allclose(
            ours, peer.log_likelihoods([(context, f" {text}") for text in texts]), **CLOSE)
    alone = continuation_log_probs(
        model, [[opening, *ids] for ids in encode_documents(tokenizer, texts)], [1] * len(texts))
    np.testing.assert_allclose(alone, peer.log_likelihoods([("", text) for text in texts]), **CLOSE)


def test_where_we_differ_on_purpose(both, tokenizer):
    """A text that spells <|endoftext|> is text to us; the harness reads it as the token."""
    model, peer = both
    pages = [f"One {END_OF_TEXT} two."]
    ours, theirs = perplexities(model, tokenizer, pages, CONTEXT)[1], peer.perplexities(pages)[1]
    assert abs(ours[0] - theirs[0]) > 1


def test_a_real_model_on_real_data(capsys):
    folder = os.environ.get("MODERN_LLM_AGREEMENT", "")
    if not folder or not os.environ.get("MODERN_LLM_DATA"):
        pytest.skip("set MODERN_LLM_AGREEMENT to a checkpoint folder, and MODERN_LLM_DATA")
    (model, tokenizer), peer = load(folder), Peer(folder, 512, batch_size=2)
    pages = cut_texts(tokenizer, held_out_pages("wikitext-2-raw-v1", "test"), 1500)
    ours = perplexities(model, tokenizer, pages, 512, detokenise)
    theirs = peer.perplexities(pages, lambda page: wikitext_detokenizer({"page": page}))
    names = ["word perplexity", "byte perplexity", "bits per byte"]
    lines = [f"{name}: {a:.6f} here, {b:.6f} there, {a / b - 1:+.1e}"
             for name, a, b in zip(names, ours[0], theirs[0])]
    texts, demonstrations = ([r.text for r in sentences("sst2", "test", 20)],
                             draw_demonstrations(sentences("sst2", "train", 200), 4, 1)[0])
    peer.model._max_length = 2048
    for name, separator in SEPARATORS.items():
        labels = label_log_probs(model, tokenizer, demonstrations, texts, separator=separator)
        expected = peer.log_likelihoods(label_pairs(
            demonstrations, texts, separator)).reshape(labels.shape)
        lines.append(f"{labels.size} label log-likelihoods, {name}: at most "
                     f"{np.abs(labels / expected - 1).max():.1e} apart")
        np.testing.assert_allclose(labels, expected, rtol=1e-3)
    with capsys.disabled():
        print("", *lines, sep="\n")
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-3)
