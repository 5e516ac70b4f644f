"""A conversation survives what a person can type, and says what it could not use."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from modern_llm.cli import main, talk
from modern_llm.cli.talk import Chat, open_model, samples
from modern_llm.config import ModelConfig
from modern_llm.data.tokens import encode_documents
from modern_llm.interchange.hub import find_checkpoint
from modern_llm.messages import StageError
from modern_llm.models.generation import Sampling, next_token_probabilities
from modern_llm.tests.test_inference import SMALL, saved

fault = pytest.mark.fault("conversation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run `it` with a model that chats and one that does not, nothing learnt, context 64."""
    root = tmp_path_factory.mktemp("talk")
    cfg = ModelConfig(**{**vars(SMALL), "context_length": 64})
    for stage in ("pretrain", "sft", "verifier"):
        saved(root / "it" / stage / "checkpoint", cfg, chat=stage != "pretrain")
        (root / "it" / stage / "results.json").write_text("{}")
    (root / "it" / "verifier" / "checkpoint" / "verifier.json").write_text("{}")
    (root / "it" / "run.json").write_text('{"stages": {}}')
    return root


def chat(folder: Path, typed: bytes, *words: str) -> tuple[str, str, int]:
    """What `modern-llm chat` prints, what it notes beside it, and its exit code."""
    done = CliRunner().invoke(main, ["chat", "--run", "it", "--output-dir", str(folder),
                                     "--max-new-tokens", "4", "--device", "cpu", *words],
                              input=typed)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.output, done.stderr, done.exit_code


@fault
@pytest.mark.parametrize(
    "typed, noted, answers",
    [(b"caf\xe9\n", "byte 4 of this message is not UTF-8", 1),
     (b"\xff\xfeh\0i\0\n", "byte 1", 1), (b"word " * 300 + b"\nagain\n", "at most", 1),
     (b"x" * 100_000 + b"\n", "the message has", 0), (b"\0\0\n", "", 1),
     (b"\n   \n\t\r\n", "", 0), (b"", "", 0), (b"\x1b[31mred\x1b[0m\x07\n", "", 1),
     (b"<|end|><|user|><|endoftext|>\n", "", 1), (b"/hepl\n", "/hepl is not a command", 0),
     (b"/NEW\n", "is not a command; did you mean '/new'", 0),
     (b" /new words\n", "", 1), (b"/usr/bin is what?\n", "", 1),
     (b"\xed\xb3\xa9 half\n", "is not UTF-8", 1), ("😀 日本\r\n".encode(), "", 1),
     (b"no new line at the end", "", 1), (b"\xef\xbb\xbf/quit\nmore\n", "", 0),
     (b"one\n" * 12, "forgotten", 12), (b"one\n/new\n/quit\ntwo\n", "", 1)])
def test_what_a_person_can_type(folder, typed, noted, answers, monkeypatch):
    asked = []
    monkeypatch.setattr(talk, "stream",
                        lambda model, ids, **options: asked.append(ids) or iter([300, 301]))
    _, beside, code = chat(folder, typed)
    assert code == 0 and noted in beside and len(asked) == answers and "Traceback" not in beside


def without_an_end(tokenizer) -> int:
    """A token that no model of these tests draws: its answers never end by themselves."""
    return tokenizer.get_vocab_size() - 1


@fault
def test_a_text_that_fills_the_context_says_so_or_goes_on(folder, monkeypatch):
    monkeypatch.setattr(talk, "end_id", without_an_end)
    monkeypatch.setattr(talk, "end_of_text_id", without_an_end)
    full = "the context of 64 tokens is full, so the text ends here; --streaming writes on"
    for words, said in (([], True), (["--streaming"], False)):
        _, beside, code = chat(folder, b"Hello\n", "--max-new-tokens", "90", *words)
        assert (full in beside) == said and code == 0
    model, tokenizer, place = open_model("it", "pretrain", None, str(folder), "cpu")
    for streaming, told in ((False, [f"(3 of 3: {full}, seeing the first and the last of it)"]),
                            (True, [])):
        notes = []
        texts = list(samples(model, tokenizer, place, "Mia", 3, max_new_tokens=90,
                             streaming=streaming, note=notes.append))
        assert notes == told and len(texts) == 3


@fault
def test_an_over_long_message_changes_nothing(folder):
    model, tokenizer, _ = open_model("it", "sft", None, str(folder), "cpu", purpose="chat")
    conversation = Chat(model, tokenizer, max_new_tokens=4, temperature=0)
    list(conversation.reply("Tom has 3 hats."))
    before = list(conversation.history)
    with pytest.raises(ValueError,
                       match=r"the message has (\d+) tokens; with room for an answer, at most \d+ "
                             r"fit into the context of this model, 64") as error:
        list(conversation.reply("word " * 80))
    fits = int(str(error.value).split("at most ")[1].split()[0])
    assert conversation.history == before
    text = next("a" * n for n in range(500)
                if len(encode_documents(tokenizer, ["a" * n])[0]) == fits)
    assert isinstance("".join(conversation.reply(text)), str)
    with pytest.raises(ValueError, match=f"the message has {fits + 1} tokens"):
        Chat(model, tokenizer).prompt(next(
            "a" * n for n in range(500)
            if len(encode_documents(tokenizer, ["a" * n])[0]) == fits + 1))


@fault
@pytest.mark.parametrize("raised, kept", [(KeyboardInterrupt, 4), (ValueError, 2)])
def test_an_answer_that_ends_early_leaves_whole_turns(folder, monkeypatch, raised, kept):
    model, tokenizer, _ = open_model("it", "sft", None, str(folder), "cpu", purpose="chat")
    conversation = Chat(model, tokenizer, max_new_tokens=4, temperature=0)
    list(conversation.reply("Hello"))

    def broken(*words, **options):
        yield 300
        raise raised("now")

    monkeypatch.setattr(talk, "stream", broken)
    with pytest.raises(raised):
        list(conversation.reply("Again"))
    assert [turn["role"] for turn in conversation.history] == ["user", "assistant"] * (kept // 2)
    conversation.history = conversation.history[:2]
    for _ in conversation.reply("Who reads on?"):
        break
    assert [turn["role"] for turn in conversation.history] == ["user", "assistant"] * 2


@fault
def test_ctrl_c_ends_an_answer_not_the_conversation(folder, monkeypatch):
    calls = []

    def interrupted(*words, **options):
        calls.append(1)
        yield 300
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(talk, "stream", interrupted)
    _, beside, code = chat(folder, b"one\ntwo\n")
    assert code == 0 and "(interrupted; the conversation goes on)" in beside and len(calls) == 2


@fault
def test_an_empty_answer_is_said(folder, monkeypatch):
    monkeypatch.setattr(talk, "stream", lambda *words, **options: iter(()))
    assert "the model ended its answer at once" in chat(folder, b"Hello\n")[1]


@fault
@pytest.mark.parametrize("closed", ["stdin", "stdout"])
def test_closed_streams(folder, monkeypatch, closed):
    """As with `<&-` and `>&-`, where Python has None for them."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))
    monkeypatch.setattr(sys, closed, None)
    words = ["chat", "--run", "it", "--output-dir", str(folder), "--max-new-tokens", "4",
             "--device", "cpu"]
    assert main.main(words, standalone_mode=False) is None


@fault
def test_a_pipe_that_nobody_reads(folder):
    """A real process: `chat | head -1`, on a terminal of another encoding."""
    line = (f"yes hello | head -30 | {Path(sys.executable).parent}/modern-llm chat --run it "
            f"--output-dir {folder} --max-new-tokens 3 | head -1")
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "latin-1"})
    assert "Traceback" not in done.stderr and "Error" not in done.stderr and done.stdout


@fault
@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize("prompt", ["<|end|>", "a <|endoftext|> b", "<|user|><|assistant|>",
                                    "caf\udce9", "\udcff\udcfe", "\ud83d", "nul\0"])
def test_nothing_in_a_prompt_is_special(folder, monkeypatch, stage, prompt):
    model, tokenizer, place = open_model("it", stage, None, str(folder), "cpu")
    asked = []
    monkeypatch.setattr(talk, "generate",
                        lambda model, prompts, **options: asked.extend(prompts) or [[300]])
    text, = samples(model, tokenizer, place, prompt, 1)
    special = {tokenizer.token_to_id(token)
               for token in ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>", "<|system|>")}
    found = [i for i in asked[0] if i in special]
    # what opens a document, or a message and its answer
    assert len(found) == (1 if stage == "pretrain" else 4)
    assert text.isprintable() or "\0" in text


@fault
def test_many_samples_are_those_of_few(folder):
    model, tokenizer, place = open_model("it", "pretrain", None, str(folder), "cpu")
    many = [text for text, _ in zip(
        samples(model, tokenizer, place, "Mia", 10**12, max_new_tokens=3), range(70))]
    assert (len(set(many)) > 10
            and many[:3] == list(samples(model, tokenizer, place, "Mia", 3, max_new_tokens=3)))


@fault
@pytest.mark.parametrize(
    "words, wanted, code",
    [(["--run", "itt"], "no run 'itt' in", 2), (["--run", "itt"], "did you mean 'it'", 2),
     (["--run", "a" * 300], "no run", 2), (["--run", "a\n/b"], "no run", 2),
     (["--run", "it", "--stage", "verifier"], "makes no language model", 2),
     (["--run", "it", "--stage", "pretrain"], "is a base model", 2),
     (["--checkpoint", "VERIFIER"], "is a verifier", 2),
     (["--checkpoint", "/nowhere"], "Tried", 2),
     (["--temperature", "nan"], "not a finite number", 2),
     (["--temperature", "inf"], "not a finite number", 2),
     (["--temperature", "-1"], "range", 2), (["--max-new-tokens", "0"], "range", 2),
     (["--max-new-tokens", "-5"], "range", 2), (["--seed", "-1"], "range", 2)])
def test_what_cannot_be_opened_is_named(folder, words, wanted, code):
    words = [str(folder / "it" / "verifier") if word == "VERIFIER" else word for word in words]
    if "--run" not in words and "--checkpoint" not in words:
        words += ["--run", "it"]
    done = CliRunner().invoke(
        main, ["chat", "--output-dir", str(folder), "--device", "cpu", *words], input="hello\n")
    assert (done.exit_code == code and wanted in done.output
            and isinstance(done.exception, SystemExit))


@fault
@pytest.mark.parametrize("name",
                         ["config.json", "tokenizer.json", "model.safetensors", "meta.json"])
def test_a_damaged_checkpoint_is_named(tmp_path, name):
    place = saved(tmp_path / "checkpoint", SMALL)
    (place / name).write_bytes((place / name).read_bytes()[:100])
    done = CliRunner().invoke(main, ["sample", "--checkpoint", str(place), "-n", "1"])
    assert (done.exit_code == 1 and str(place / name) in done.output
            and isinstance(done.exception, SystemExit))


@fault
def test_a_verifier_is_no_start_for_a_stage(folder):
    with pytest.raises(StageError, match="is a verifier"):
        find_checkpoint(folder / "it" / "verifier")
    assert find_checkpoint(folder / "it").parent.name == "sft"


@fault
@pytest.mark.parametrize("temperature", ["1e-40", "1e-300", "5e-324", "1e40", "1e308", "0"])
def test_any_finite_temperature(folder, temperature):
    done = CliRunner().invoke(main, ["sample", "--run", "it", "--output-dir",
                                     str(folder), "-n", "2", "--max-new-tokens", "6", "--device",
                                     "cpu", "--temperature", temperature, "--seed", str(10**30)])
    assert done.exit_code == 0 and done.output.count("---") == 2


@pytest.mark.fault("messages")
@pytest.mark.parametrize(
    "options", [{"top_p": 1e-300}, {"top_p": 1.0}, {"min_p": 1.0}, {"min_p": 0.0},
                {"top_k": 10**12}, {"top_k": 1}, {"temperature": 1e-40}, {"temperature": 1e300},
                {"temperature": 1e-40, "top_p": 1e-40, "top_k": 1, "min_p": 1.0}])
def test_extreme_settings_still_are_distributions(options):
    p = next_token_probabilities(torch.tensor([[3.0, 2.0, -40.0, 50.0]]), Sampling(1, **options))
    assert p.isfinite().all() and p.sum().item() == pytest.approx(1) and p.argmax().item() in (0, 3)


@pytest.mark.fault("messages")
@pytest.mark.parametrize(
    "options", [{"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": -1.0},
                {"top_p": 0.0}, {"top_p": float("nan")}, {"top_k": 0},
                {"min_p": float("nan")}, {"repetition_penalty": float("inf")},
                {"repetition_penalty": float("nan")}, {"samples": 0}, {"max_new_tokens": -2}])
def test_settings_that_mean_nothing_are_refused(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"generate: {name}=.* must be"):
        Sampling(**{"max_new_tokens": 1, **options})


@fault
@pytest.mark.parametrize("limit", ["nan", "inf", "0", "-1", "1e999"])
def test_a_limit_is_a_number(folder, limit):
    done = CliRunner().invoke(main, ["check-inference", "--run", "it", "--output-dir", str(folder),
                                     "--limit-gb", limit, "--to", str(folder / "ok.json")])
    assert done.exit_code == 2 and "--limit-gb" in done.output and not (folder / "ok.json").exists()
