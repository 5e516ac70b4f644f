"""A server that others' programs can rely on: an answer is the one that the model gives alone,
whoever asks beside it, and what cannot be answered is said in OpenAI's form.
"""

import contextlib
import http.client
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from click.testing import CliRunner

from modern_llm.cli import main
from modern_llm.config import ModelConfig, VerifierConfig
from modern_llm.data.chat import encode_chat, end_id
from modern_llm.data.tokens import encode_documents, end_of_text_id, load_tokenizer
from modern_llm.evaluation.attention import attention_maps
from modern_llm.files import atomic_folder
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.generation import Sampling, generate
from modern_llm.models.saving import load_model
from modern_llm.models.verifier import VerifierModel
from modern_llm.tests.browser import chromium_page
from modern_llm.tests.serve_load import load, post
from modern_llm.tests.test_inference import SMALL, saved
from modern_llm.training.verifier_scores import load_scorer, save_verifier

for needed in ("starlette", "uvicorn"):
    pytest.importorskip(needed, reason="pip install 'modern_llm[serve]'")

import modern_llm.serving.worker  # noqa: E402
from modern_llm.serving.batching import Batch, Job, joined, ready_text  # noqa: E402
from modern_llm.serving.places import listening  # noqa: E402
from modern_llm.serving.server import Server  # noqa: E402
from modern_llm.serving.service import Service  # noqa: E402
from modern_llm.serving.worker import (  # noqa: E402
    Limits, Served, Unavailable, Worker, served_models,
)

HELLO = [{"role": "user", "content": "Tom has 3 hats. How many hats?"}]
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run `it`, nothing learnt: a base model, two that chat, and a verifier."""
    root = tmp_path_factory.mktemp("serve")
    for stage, layers in (("pretrain", 1), ("sft", 1), ("dpo", 2)):
        saved(root / "it" / stage / "checkpoint",
              ModelConfig(**{**vars(SMALL), "num_layers": layers}), chat=stage != "pretrain")
    place = root / "it" / "sft" / "checkpoint"
    verifier = VerifierModel(load_model(place), VerifierConfig(head_dropout=0.0)).eval()
    torch.nn.init.normal_(verifier.head.weight, std=0.5)
    with atomic_folder(root / "it" / "verifier" / "checkpoint") as folder:
        save_verifier(folder, verifier, load_tokenizer(place), (1.0, 0.01, 0.05, 2.0))
    (root / "it" / "run.json").write_text('{"stages": {}}')
    return root


def in_float64(*words, **options):
    """`load_model`, its weights as float64."""
    return load_model(*words, **options).double()


@contextlib.contextmanager
def serving(runs, key=None, judge=True, **limits):
    """The address of a server of the run, and its worker; both end behind the block. Its models
    compute in float64, so that no draw hangs on how sums of a batch were rounded.
    """
    models, folder = served_models("it", (), None, str(runs))
    worker = Worker("cpu", Limits(**limits), folder if judge else None)
    listener = listening("127.0.0.1", 0)
    server = Server(Service("it", models, worker, key))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    worker.start()
    thread.start()
    patch = pytest.MonkeyPatch()
    patch.setattr(modern_llm.serving.worker, "load_model", in_float64)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", worker
    finally:
        patch.undo()
        server.should_exit = True
        thread.join(20)
        worker.close()
        worker.join(20)
        assert not thread.is_alive() and not worker.is_alive()


@pytest.fixture(scope="module")
def server(runs):
    with serving(runs) as (address, _):
        yield address


def send(address, method, path, data=None, headers=None):
    """Status, headers and text of the answer to one request."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, path, data,
                           {"Content-Type": "application/json"} if headers is None else headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()


def streamed(address, path, body):
    """The pieces that a stream has, as JSON; it must be well formed and whole."""
    status, headers, text = send(address, "POST", path, json.dumps({**body, "stream": True}))
    events = text.split("\n\n")
    assert status == 200 and headers["content-type"].startswith("text/event-stream"), text
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(one.removeprefix("data: ")) for one in events[:-2]]


def alone(runs, stage, prompt, tokens, seed, **options):
    """What the model writes without a server: the text of `generate`."""
    place = runs / "it" / stage / "checkpoint"
    tokenizer, model = load_tokenizer(place), in_float64(place).eval()
    ids, ending = ((encode_chat(tokenizer, prompt, generation_prompt=True), end_id(tokenizer))
                   if isinstance(prompt, list) else
                   ([end_of_text_id(tokenizer), *encode_documents(tokenizer, [prompt])[0]],
                    end_of_text_id(tokenizer)))
    return [tokenizer.decode(one) for one in generate(
        model, [ids], max_new_tokens=tokens, seed=seed, eos_id=ending, **options)]


@pytest.mark.parametrize("options", [{}, {"sliding_window": 6, "use_attention_sinks": True},
                                     {"num_experts": 2, "experts_per_token": 1}], ids=str)
def test_a_row_is_what_it_is_alone(options):
    """Jobs of any length that come and go at any time, some cancelled: each text is that of
    `generate`.
    """
    torch.manual_seed(1)
    model = ModernDecoderLM(ModelConfig(**{**vars(SMALL), "context_length": 48, **options}))
    for weight in model.double().eval().parameters():
        if weight.ndim >= 2:  # as large as trained ones, so that what is read moves the draws
            torch.nn.init.normal_(weight, std=0.3)
    tokenizer = type("Letters", (), {"decode": lambda self, ids: "".join(map(chr, ids))})()
    draws, batch, found, jobs = random.Random(0), Batch(model, tokenizer), {}, []

    def job(number):
        prompts = [[draws.randrange(512) for _ in range(draws.randint(1, 40))]
                   for _ in range(draws.randint(1, 2))]
        sampling = Sampling(draws.randint(1, 30), draws.choice([0.0, 0.7, 1.0]), seed=number,
                            top_p=draws.choice([None, 0.9]), eos_id=draws.choice([None, 7]),
                            samples=draws.randint(1, 3), stop=[[3, 4]])
        return Job(prompts, sampling, found.setdefault(number, []).append)

    for step in range(80):
        if step < 45 and draws.random() < 0.4:
            new = [job(len(jobs) + i) for i in range(draws.randint(1, 3))]
            jobs += new
            batch.join(new)
        batch.step()
        if draws.random() < 0.03 and batch.lines:
            draws.choice(batch.lines).job.cancelled = True
        if batch.lines:
            rows = [line for line in batch.lines if not line.done]
            assert 2 * len(rows) > len(batch.lines) and len(batch.ids) == len(batch.lines)
    assert not batch.lines and batch.cache is None and len(jobs) > 20
    assert 0 < sum(job.cancelled for job in jobs) < len(jobs) / 2
    for number, job in enumerate(jobs):
        if job.cancelled:
            continue
        how = {name: getattr(job.sampling, name)
               for name in ("max_new_tokens", "temperature", "seed", "top_p", "eos_id", "samples",
                            "stop")}
        for place, prompt in enumerate(job.prompts):
            reasons, first = [], place * job.sampling.samples
            wanted = generate(model, [prompt], reasons=reasons, **how)
            for k, (tokens, reason) in enumerate(zip(wanted, reasons)):
                pieces = [piece for piece in found[number] if piece.index == first + k]
                assert "".join(piece.text for piece in pieces) == tokenizer.decode(tokens)
                assert [piece.finish for piece in pieces if piece.finish] == [
                    "stop" if reason == "ending" else "length"]


def test_joined_caches_have_no_padding_that_no_row_needs():
    model = ModernDecoderLM(SMALL).eval()
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    caches = [model.new_cache(1, 60) for _ in prompts]
    with torch.inference_mode():
        for prompt, cache in zip(prompts, caches):
            model.hidden(torch.tensor([prompt]), cache=cache)
        whole = joined(caches, 4)
        assert (whole.length, whole.max_length, whole.pad_lengths.tolist()) == (5, 9, [2, 4, 0])
        whole.select(torch.tensor([0, 1]))
        less = joined([whole], 1)
        assert (less.length, less.pad_lengths.tolist()) == (3, [0, 2])
        for row, prompt in enumerate(prompts[:2]):
            alone = model(torch.tensor([[*prompt, 20]]))[0, -1]
            one = joined([less], 1)
            assert torch.allclose(model(torch.full((2, 1), 20), cache=one)[row, -1], alone,
                                  atol=1e-5)


@pytest.mark.parametrize("text, stops", [
    ("one two\nthree", ["\n"]), ("one two", ["two "]), ("aabaabaac", ["aabaac"]), ("abc", ["abc"]),
    ("ab\ufffdc", []), ("abab", ["b", "ab"]), ("stop and go", ["go", "and"])])
def test_no_part_of_a_stop_is_shown(text, stops):
    """However the text grows, what is shown is the text up to the first stop."""
    ends = [text.find(stop) for stop in stops if stop in text]
    for size in (1, 2, 3):
        shown = 0
        for end in range(size, len(text) + size, size):
            ready, stopped = ready_text(text[:end], stops)
            assert ready >= shown and (not ends or ready <= min(ends))
            shown = ready
            if stopped:
                break
        assert stopped == bool(ends) and (not ends or shown == min(ends))


@pytest.mark.parametrize("stage, path", [("sft", CHAT), ("pretrain", PLAIN), ("dpo", PLAIN)])
def test_an_answer_is_that_of_generate_whole_or_streamed(server, runs, stage, path):
    asked = HELLO if path == CHAT else "Mia has"
    body = {"model": stage, "max_tokens": 24, "seed": 5, "temperature": 0.8, "top_p": 0.95,
            "messages" if path == CHAT else "prompt": asked}
    status, whole = post(server, path, body)
    choice = whole["choices"][0]
    said = choice["message"]["content"] if path == CHAT else choice["text"]
    wanted, = alone(runs, stage, asked, 24, 5, temperature=0.8, top_p=0.95)
    assert status == 200 and said == wanted and post(server, path, body)[1]["choices"] == [choice]
    pieces = streamed(server, path, {**body, "stream_options": {"include_usage": True}})
    told = [piece["choices"][0] for piece in pieces[:-1]]
    assert "".join(one["delta"].get("content", "") if path == CHAT else one["text"]
                   for one in told) == said
    assert told[-1]["finish_reason"] == choice["finish_reason"] and len(told) > 5
    assert pieces[-1]["usage"] == whole["usage"] and pieces[-1]["choices"] == []
    assert whole["usage"]["total_tokens"] == sum(
        whole["usage"][name] for name in ("prompt_tokens", "completion_tokens"))
    assert post(server, path, {**body, "seed": 6})[1]["choices"] != [choice]
    without = {**body, "seed": None}
    assert post(server, path, without)[1]["choices"] != post(server, path, without)[1]["choices"]


def test_several_answers_prompts_stops_and_limits(server, runs):
    body = {"model": "sft", "messages": HELLO, "max_completion_tokens": 12, "seed": 3, "n": 3}
    answers = [one["message"]["content"] for one in post(server, CHAT, body)[1]["choices"]]
    assert answers == alone(runs, "sft", HELLO, 12, 3, samples=3) and len(set(answers)) == 3
    several = [piece["choices"][0] for piece in streamed(server, CHAT, body)]
    assert answers == ["".join(one["delta"].get("content", "") for one in several
                               if one["index"] == i) for i in range(3)]
    many = {"model": "pretrain", "prompt": ["Mia has", "Tom"], "seed": 4, "n": 2}
    texts = [one["text"] for one in post(server, PLAIN, many)[1]["choices"]]
    assert texts == [text for prompt in many["prompt"]
                     for text in alone(runs, "pretrain", prompt, 16, 4, samples=2)]
    ids = [0, *encode_documents(load_tokenizer(runs / "it/pretrain/checkpoint"), ["Tom"])[0]]
    assert post(server, PLAIN, {**many, "prompt": ids, "n": 1})[1]["choices"][0]["text"] == texts[2]
    long = {"model": "pretrain", "prompt": "Mia", "seed": 1, "max_tokens": 80}
    text = post(server, PLAIN, long)[1]["choices"][0]["text"]
    stop = text[20:23]
    cut = post(server, PLAIN, {**long, "stop": ["never said", stop]})[1]["choices"][0]
    assert cut["text"] == text[:text.find(stop)] and cut["finish_reason"] == "stop"
    greedy = {**long, "temperature": 0, "seed": None}
    assert post(server, PLAIN, greedy)[1]["choices"] == post(server, PLAIN, greedy)[1]["choices"]
    full = post(server, PLAIN, {**long, "max_tokens": 1000})[1]
    assert full["usage"]["total_tokens"] <= 256 and full["choices"][0]["finish_reason"] in (
        "length", "stop")


def test_thirty_two_clients_at_once(server, runs):
    bodies = [{"model": ("sft", "dpo")[i % 2], "seed": i, "max_tokens": 30, "messages": [
        {"role": "user", "content": "word " * (i % 7) + "?"}]} for i in range(32)]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda body: post(server, CHAT, body), bodies))
    assert {status for status, _ in together} == {200}
    assert [answer["choices"][0]["message"]["content"] for _, answer in together] == [
        alone(runs, body["model"], body["messages"], 30, i)[0] for i, body in enumerate(bodies)]
    measured = load(server, "sft", clients=32, each=1, tokens=4)
    assert measured["requests"] == 32 and measured["failed"] == 0
    assert 0 < measured["p50_seconds"] <= measured["p95_seconds"] <= measured["seconds"]


CASES = [
    (CHAT, b"{", 400, "is not JSON", "invalid_json"), (CHAT, b"", 400, "is not JSON", None),
    (CHAT, b"[1]", 400, "is a list, and should be a JSON object", None),
    (CHAT, b'{"model": "\xff"}', 400, "is not JSON", None), (CHAT, b"[" * 90_000, 400, "", None),
    (CHAT, b'{"seed": NaN}', 400, "NaN is no JSON", None),
    (CHAT, b'{"seed": ' + b"9" * 5000 + b"}", 400, "is not JSON", None),
    (CHAT, rb'{"model": "\ud83d"}', 400, "half of a character", None),
    (CHAT, {"model": "stf"}, 404, "'stf'; did you mean 'sft'?", "model_not_found"),
    (CHAT, {"model": 3}, 400, "model=3 is a whole number", None),
    (CHAT, {"model": None}, 400, "GET /v1/models lists them", None),
    (CHAT, {"model": "pretrain"}, 400, "POST /v1/completions", "model_without_chat"),
    (CHAT, {"messages": []}, 400, "at least one", None),
    (CHAT, {"messages": "hello"}, 400, "a list of messages", None),
    (CHAT, {"messages": [3]}, 400, "messages[0]=3", None),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0].content", None),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, 400, "system, user or", None),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text alone",
     None),
    (CHAT, {"messages": [{"role": "user", "content": "word " * 600}]}, 400,
     "the context of sft holds 255", "context_length_exceeded"),
    (CHAT, {"temperature": -1}, 400, "temperature=-1", None),
    (CHAT, {"temperature": "hot"}, 400, 'temperature="hot" is text', None),
    (CHAT, {"temperature": True}, 400, "is true or false", None),
    (CHAT, {"top_p": 0}, 400, "top_p=0", None), (CHAT, {"seed": 0.5}, 400, "seed=0.5", None),
    (CHAT, {"seed": 2**70}, 400, "below 2**63", None), (CHAT, {"n": 0}, 400, "n=0", None),
    (CHAT, {"n": 33}, 400, "a request may have 32", None),
    (CHAT, {"max_tokens": 0}, 400, "from 1 to 1024", None),
    (CHAT, {"max_tokens": 5000}, 400, "from 1 to 1024", None),
    (CHAT, {"max_completion_tokens": "9"}, 400, "max_completion_tokens", None),
    (CHAT, {"stop": 3}, 400, "stop=3", None), (CHAT, {"stop": [""]}, 400, "stop=", None),
    (CHAT, {"stop": ["a"] * 5}, 400, "at most 4", None),
    (CHAT, {"stream": "yes"}, 400, "true or false", None),
    (CHAT, {"stream_options": 1}, 400, "stream_options", None),
    (CHAT, {"tools": [{}]}, 400, "tools is not supported here", "unsupported_parameter"),
    (PLAIN, {"prompt": None}, 400, "text, token ids", None),
    (PLAIN, {"prompt": [1, 9999]}, 400, "from 0 to 511", None),
    (PLAIN, {"prompt": [[]]}, 400, "prompt=", None), (PLAIN, {"echo": True}, 400, "echo", None),
    (PLAIN, {"prompt": ["x"] * 40}, 400, "makes 40 answers", None),
    ("/score", {"problem": "", "answer": "7"}, 400, "problem", None),
    ("/score", {"problem": "1+1?", "answer": "word " * 600}, 400, "shorten one", None),
    ("/attention", {"answer": "x", "messages": HELLO, "layer": 9}, 400, "from 0 to 0", None),
    ("/attention", {"answer": "x", "prompt": ""}, 400, "not empty", None),
]


def test_what_cannot_be_asked_is_said(server, capfd):
    for path, body, status, says, code in CASES:
        if isinstance(body, dict):
            base = {"model": "sft", "prompt": "Mia", "messages": HELLO}
            if path == "/attention":
                del base["messages"]
            body = json.dumps({**base, **body}).encode()
        found, _, text = send(server, "POST", path, body)
        error = json.loads(text)["error"]
        assert (found, set(error)) == (status, {"message", "type", "param", "code"}), (body, text)
        assert says in error["message"] and code in (None, error["code"]), (body, error)
    for method, path, headers, status in (
            ("POST", CHAT, {}, 415), ("POST", CHAT, {"Content-Type": "text/plain"}, 415),
            ("GET", CHAT, None, 405), ("GET", "/v1/nothing", None, 404),
            ("GET", "/v1/models/stf", None, 404), ("GET", "/v1/models", {"Host": "x.org"}, 403),
            ("GET", "/v1/models", {"Host": "[::"}, 403)):
        found, _, text = send(server, method, path, b"{}" if method == "POST" else None, headers)
        assert found == status and json.loads(text)["error"]["message"], (path, text)
    assert post(server, CHAT, {"model": "sft", "messages": HELLO, "max_tokens": 1})[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_limits_and_the_key(runs, capfd):
    with serving(runs, key="k\u00e9y-" + "x" * 20, requests=1, body_bytes=500, seconds=1,
                 rows=2, judge=False) as (address, worker):
        said = {"Content-Type": "application/json"}
        key = {**said, "Authorization": "Bearer k\u00e9y-".encode() + b"x" * 20}
        small = json.dumps({"model": "sft", "messages": HELLO, "max_tokens": 2})
        for headers in (said, {**said, "Authorization": "Bearer nothing"},
                        {**said, "Authorization": "k\u00e9y-".encode() + b"x" * 20}):
            status, _, text = send(address, "POST", CHAT, small, headers)
            assert status == 401 and "API key" in json.loads(text)["error"]["message"]
        assert send(address, "GET", "/v1/models", None, said)[0] == 401
        assert send(address, "GET", "/", None, {})[0] == 200  # the page, which asks for it
        assert send(address, "POST", CHAT, small, key)[0] == 200
        for size in (600, 4_000):
            status, _, text = send(address, "POST", CHAT, b" " * size, key)
            assert status == 413 and "more than 500 bytes" in text
        status, _, text = send(address, "POST", "/score", '{"problem": "a", "answer": "b"}', key)
        assert status == 404 and "has no verifier" in text
        slowed(worker, "sft", 0.05)
        long = json.dumps({"model": "sft", "messages": HELLO, "max_tokens": 200,
                           "temperature": 0})
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(send, address, "POST", CHAT, long, key)
            until(lambda: worker.batches["sft"].active == 1)
            status, headers, text = send(address, "POST", CHAT, small, key)
            assert status == 429 and headers["retry-after"] == "1", text
            status, _, text = first.result()
        found = json.loads(text)
        assert status == 200 and found["choices"][0]["finish_reason"] == "length"
        assert 2 < found["usage"]["completion_tokens"] < 100
    assert "Traceback" not in capfd.readouterr().err


def slowed(worker, name, seconds):
    """Let every step of a model take so long."""
    batch = worker.batches[name]
    step = batch.step

    def slowly():
        time.sleep(seconds if batch.lines else 0)
        step()

    batch.step = slowly


def until(claim, seconds=5):
    """Wait for something that is about to happen."""
    ends = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(runs, stream):
    with serving(runs, rows=1) as (address, worker):
        body = {"model": "sft", "messages": HELLO, "max_tokens": 1}
        assert post(address, CHAT, body)[0] == 200
        slowed(worker, "sft", 0.03)
        connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=20)
        connection.request("POST", CHAT, json.dumps({**body, "max_tokens": 200, "stream": stream,
                                                     "temperature": 0}),
                           {"Content-Type": "application/json"})
        if stream:
            assert connection.getresponse().read(20).startswith(b"data: ")
        until(lambda: worker.batches["sft"].active == 1)
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        begun = time.monotonic()
        assert post(address, CHAT, body)[0] == 200  # 200 tokens would take six seconds
        assert time.monotonic() - begun < 2 and worker.batches["sft"].active == 0


def test_a_model_that_fails_takes_nobody_with_it(runs, capfd):
    with serving(runs) as (address, worker):
        body = {"model": "sft", "messages": HELLO, "max_tokens": 4}
        assert post(address, CHAT, body)[0] == 200
        with torch.no_grad():
            worker.batches["sft"].model.norm.weight.fill_(float("nan"))
        status, found = post(address, CHAT, body)
        assert status == 500 and "not finite" in found["error"]["message"]
        assert post(address, CHAT, {**body, "model": "dpo"})[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_who_waits_is_told_of_the_end_though_another_has_left():
    worker, told = Worker(), []
    left, waits = (worker.ask(lambda: 1) for _ in range(2))
    worker.submit(Served("sft", Path("sft")), Job([[0]], Sampling(max_new_tokens=1), told.append))
    left.cancel()
    worker.close()
    worker.run()
    assert isinstance(waits.exception(timeout=0), Unavailable)
    assert [type(error) for error in told] == [Unavailable]


def test_scores_and_attention_are_those_of_the_package(server, runs):
    answer = "Tom has 3+4=<<3+4=7>>7 hats.\n#### 7"
    problem = HELLO[0]["content"]
    found = post(server, "/score", {"problem": problem, "answer": answer})[1]
    strip = load_scorer(runs / "it").running(problem, answer)
    assert [(one["text"], one["score"]) for one in found["running"]] == strip
    assert found["score"] == strip[-1][1]
    place = runs / "it" / "dpo" / "checkpoint"
    tokenizer, model = load_tokenizer(place), load_model(place)
    prompt = encode_chat(tokenizer, HELLO, generation_prompt=True)
    ids = [*prompt, *encode_documents(tokenizer, [answer])[0]]
    maps = attention_maps(model, torch.tensor([ids]))[:, 0]
    for chosen, wanted in (({}, maps[-1].mean(0)), ({"layer": 0, "head": 1}, maps[0, 1])):
        shown = post(server, "/attention", {"model": "dpo", "messages": HELLO, "answer": answer,
                                            **chosen})[1]
        assert (shown["start"], shown["layers"], shown["heads"]) == (len(prompt), 2, 2)
        assert "".join(shown["tokens"][shown["start"]:]) == answer
        for t, row in enumerate(shown["weights"], len(prompt)):  # written from the token before
            assert row == pytest.approx(wanted[t - 1, :t].tolist(), abs=1e-4)


def test_the_official_client(runs):
    openai = pytest.importorskip("openai", reason="pip install 'modern_llm[clients]'")
    with serving(runs, key="secret" * 4) as (address, _):
        client = openai.OpenAI(base_url=address + "/v1", api_key="secret" * 4, max_retries=0)
        assert [model.id for model in client.models.list()] == ["pretrain", "sft", "dpo"]
        assert client.models.retrieve("sft").owned_by == "modern_llm"
        body = dict(model="sft", messages=HELLO, max_tokens=10, seed=1)
        whole = client.chat.completions.create(**body)
        pieces = list(client.chat.completions.create(
            **body, stream=True, stream_options={"include_usage": True}))
        said = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert said == whole.choices[0].message.content and pieces[-1].usage == whole.usage
        assert said == alone(runs, "sft", HELLO, 10, 1)[0]
        text = client.completions.create(model="pretrain", prompt="Mia", seed=2).choices[0].text
        assert text == alone(runs, "pretrain", "Mia", 16, 2)[0]
        for error, more in ((openai.NotFoundError, {"model": "stf"}),
                            (openai.BadRequestError, {"temperature": -1})):
            with pytest.raises(error) as found:
                client.chat.completions.create(**{**body, **more})
            assert found.value.param in more
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="other").models.list()


def refused(runs, *words, **env):
    """What `modern-llm serve` says when it does not start."""
    done = CliRunner(env={"MODERN_LLM_API_KEY": None, **env}).invoke(
        main, ["serve", "--run", "it", "--output-dir", str(runs), *words])
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit), done.output
    assert done.output.count("\n") == 1 and "Traceback" not in done.output
    return done.output


def test_what_keeps_it_from_starting_is_one_line(runs, monkeypatch):
    assert "there is no API key: set one, `export MODERN_LLM_API_KEY" in refused(
        runs, "--host", "0.0.0.0")
    assert "is no address to listen at" in refused(runs, "--host", "192.0.2.1", "--port", "0",
                                                   MODERN_LLM_API_KEY="x" * 20)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert f"port {port} of 127.0.0.1 is in use" in refused(runs, "--port", port)
        assert "--port 0 for any that is free" in refused(runs, "--port", port)
    assert "no run 'itt'" in refused(runs, "--port", "0", "--run", "itt")
    assert "makes no language model" in refused(runs, "--port", "0", "--stage", "verifier")
    (runs / "bare").mkdir(exist_ok=True)
    assert "has no model of stage sft; it has none" in refused(
        runs, "--port", "0", "--run", "bare", "--stage", "sft")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *more: None if name == "uvicorn" else found(name, *more))
    assert "serve needs uvicorn, which the extra `serve` brings: pip install" in refused(runs)


def test_one_checkpoint_is_served_by_its_name(runs):
    place = str(runs / "it" / "dpo" / "checkpoint")
    for given in (place, str(runs / "it" / "dpo")):
        models, judge = served_models(None, (), given, None)
        assert list(models) == ["dpo"] and str(models["dpo"].folder) == place and judge is None
    assert list(served_models("it", ("dpo", "sft"), None, str(runs))[0]) == ["dpo", "sft"]


def started(runs, port):
    """A server in a process of its own, and its address once it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "modern_llm.cli", "serve", "--run", "it", "--output-dir", str(runs),
         "--port", str(port), "--device", "cpu"], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    line = process.stderr.readline()
    assert line.startswith("it: pretrain, sft, dpo at http://127.0.0.1:"), line
    return process, line.split(" at ")[1].split("/ ")[0]


@pytest.mark.thorough
def test_killed_and_started_again(runs):
    """kill -9 leaves nothing behind: the port is free, a seed has the same text."""
    body = {"model": "sft", "messages": HELLO, "seed": 8, "max_tokens": 20}
    process, address = started(runs, 0)
    before = post(address, CHAT, body)[1]["choices"]
    process.kill()
    process.wait(20)
    process, address = started(runs, urlsplit(address).port)
    assert post(address, CHAT, body)[1]["choices"] == before
    process.kill()
    process.wait(20)


def test_told_to_end(runs):
    """SIGTERM lets an answer under way end, and the process ends well."""
    body = {"model": "sft", "messages": HELLO, "seed": 8}
    process, address = started(runs, 0)
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=20)
    connection.request("POST", CHAT, json.dumps({**body, "max_tokens": 200, "n": 30,
                                                 "stream": True}),
                       {"Content-Type": "application/json"})
    answer = connection.getresponse()
    read = answer.read(20)
    process.send_signal(signal.SIGTERM)
    read += answer.read()
    assert read.endswith(b"data: [DONE]\n\n") and process.wait(20) == 0
    assert "Traceback" not in process.stderr.read()


def test_the_page_in_a_browser(runs):
    """Two stages side by side, streamed, with score and attention; a phone, a dark room, a key."""
    asked, wrong = [], []
    with serving(runs, key="secret" * 4) as (address, worker), chromium_page() as page:
        page.on("request", lambda r: asked.append(r.url))
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.goto(address)
        assert not page.locator("#stop").is_visible()
        page.locator("#key").fill("secret" * 4)
        page.locator("#key").press("Tab")
        page.locator("#stages input[value=sft]").check()
        page.locator("#tokens").fill("12")
        page.locator("#seed").fill("5")
        page.locator("#text").fill(HELLO[0]["content"])
        page.locator("#text").press("Enter")
        page.locator(".score").nth(1).wait_for()
        for card, stage in enumerate(("sft", "dpo")):
            said = page.locator("article").nth(card)
            assert said.locator("h2").inner_text() == stage
            assert said.locator(".said").text_content() == alone(
                runs, stage, HELLO, 12, 5, temperature=0.7)[0]
            assert "the verifier: 0." in said.inner_text() and "tokens" in said.inner_text()
        card = page.locator("article").nth(1)
        card.get_by_role("button", name="What was it written from?").click()
        tokens = card.locator(".tokens span[tabindex]")
        tokens.nth(2).click()
        assert tokens.nth(2).get_attribute("aria-pressed") == "true"
        assert card.locator(".tokens span[title$='%']").count() == tokens.evaluate_all(
            "all => [...all[2].parentNode.children].indexOf(all[2])")
        card.locator("select").first.select_option("0")
        page.locator("#text").fill("And now?")
        page.locator("#text").press("Enter")
        page.locator(".score").nth(3).wait_for()
        turns = [*HELLO, {"role": "assistant", "content": alone(runs, "sft", HELLO, 12, 5,
                                                                temperature=0.7)[0]},
                 {"role": "user", "content": "And now?"}]
        assert page.locator("article .said").nth(2).text_content() == alone(
            runs, "sft", turns, 12, 5, temperature=0.7)[0]
        background = "getComputedStyle(document.querySelector('form')).backgroundColor"
        light = page.evaluate(background)
        page.emulate_media(color_scheme="dark")
        assert page.evaluate(background) != light
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        page.locator("#tokens").fill("200")
        page.locator("#temperature").fill("0")
        slowed(worker, "sft", 0.05)
        page.locator("#text").fill("On and on")
        page.locator("#text").press("Enter")
        page.locator("#stop").click()
        page.get_by_text("stopped").first.wait_for()
        until(lambda: not worker.batches["sft"].active)
        page.locator("#new").click()
        assert page.locator("article").count() == 0
        assert page.evaluate("document.activeElement.id") == "text"
    assert wrong == [] and all(url.startswith((address, "data:")) for url in asked)
