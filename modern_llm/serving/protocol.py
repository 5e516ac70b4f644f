"""OpenAI's interface in words and forms: what a request may say, checked field by field, and how
answers, pieces of them and refusals are written. No torch.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from modern_llm.config import nearest

INVALID = "invalid_request_error"
DEFAULT_COMPLETION = 16  # tokens of a completion whose request says nothing, as OpenAI has it
MOST_STOPS = 4


class Refused(Exception):
    """A request that is not answered: status, and what the body of the refusal says."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 kind: str = INVALID, wait: int | None = None):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = {} if wait is None else {"Retry-After": str(wait)}


def parse(body: bytes) -> dict:
    """The JSON object that a request's body is. Refused if it is none, or has what JSON has not.
    """
    def constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        found = json.loads(body.decode("utf-8"), parse_constant=constant)
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refused(400, "the body holds half of a character, an escaped lone surrogate: send "
                           "whole ones") from error
    except (ValueError, RecursionError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Refused(400, f"the body is not JSON: {said}", code="invalid_json") from error
    if not isinstance(found, dict):
        raise Refused(400, f"the body is {_called(found)}, and should be a JSON object",
                      code="invalid_json")
    return found


def _called(value: object) -> str:
    """What JSON calls a value of this kind."""
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text",
             list: "a list", dict: "an object", type(None): "null"}
    return kinds[type(value)]


def wrong(param: str, value: object, wanted: str) -> Refused:
    """The refusal of a value that a field cannot have."""
    shown = json.dumps(value)
    shown = shown if len(shown) <= 60 else shown[:59] + "…"
    return Refused(400, f"{param}={shown} is {_called(value)}; it should be {wanted}", param,
                   "invalid_value")


def number(body: dict, name: str, default: object, ok: Callable[[float], bool], wanted: str,
           whole: bool = False) -> object:
    """The field `name` as a number for which `ok` is true; `default` where it is null or absent."""
    value = body.get(name)
    if value is None:
        return default
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not ok(value):
        raise wrong(name, value, wanted)
    return value


def flag(body: dict, name: str) -> bool:
    """The field `name` as true or false; false where it is null or absent."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return bool(value)


def text(body: dict, name: str) -> str:
    """The field `name`, which must be there, as text that says something."""
    value = body.get(name)
    if not isinstance(value, str) or not value.strip():
        raise wrong(name, value, "text that is not empty")
    return value


# Fields of OpenAI's interface that would change an answer and are not had here, and the values that
# ask for nothing.
WITHOUT = {"tools": ([],), "functions": ([],), "logprobs": (False, 0), "top_logprobs": (0,),
           "logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,),
           "best_of": (1,), "suffix": ("",), "echo": (False,), "modalities": (["text"],),
           "audio": (), "prediction": (), "response_format": ({"type": "text"},)}


@dataclass(frozen=True)
class Asked:
    """A request for answers, checked.

    Args:
        model: the name that it calls the model by.
        chat: whether its prompt is `messages`, or else `prompts`.
        sampling: fields of `generation.Sampling`, without `max_new_tokens`.
        max_tokens: of an answer; None is as many as there may be.
        stops: texts that end an answer.
        stream: whether it wants the pieces as they come.
        count: whether they end with one that says how many tokens it was.
    """

    model: str
    chat: bool
    messages: list[dict] = field(default_factory=list)
    prompts: list[str | list[int]] = field(default_factory=list)
    sampling: dict = field(default_factory=dict)
    max_tokens: int | None = None
    stops: list[str] = field(default_factory=list)
    stream: bool = False
    count: bool = False


def asked(body: dict, chat: bool, most_tokens: int, most_rows: int) -> Asked:
    """What the body of a request asks for.

    Args:
        chat: of /v1/chat/completions, else of /v1/completions.
        most_tokens: that an answer may have.
        most_rows: answers that a request may have.

    Raises:
        Refused: a field has a value that it cannot have; the message says which it can.
    """
    for name, harmless in WITHOUT.items():
        if body.get(name) is not None and body[name] not in harmless:
            raise Refused(400, f"{name} is not supported here: leave it out", name,
                          "unsupported_parameter")
    prompts = {} if chat else {"prompts": prompts_of(body.get("prompt"))}
    messages = {"messages": messages_of(body.get("messages"))} if chat else {}
    positive, share = lambda v: v >= 1, lambda v: 0 < v <= 1
    n = number(body, "n", 1, positive, "a whole number from 1", whole=True)
    if n * len(prompts.get("prompts", [0])) > most_rows:
        raise Refused(400, f"n={n} makes {n * len(prompts.get('prompts', [0]))} answers, and a "
                           f"request may have {most_rows} here", "n", "invalid_value")
    wanted = f"a whole number from 1 to {most_tokens}, the limit of this server"
    limits = [number(body, name, None, lambda v: 1 <= v <= most_tokens, wanted, whole=True)
              for name in ("max_completion_tokens", "max_tokens")]
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise wrong("stream_options", options, "an object")
    seed = number(body, "seed", None, lambda v: abs(v) < 2**63, "a whole number below 2**63",
                  whole=True)
    return Asked(
        model=model_of(body), chat=chat, **messages, **prompts,
        sampling={
            "temperature": number(body, "temperature", 1.0, lambda v: 0 <= v <= 1e6,
                                  "a number from 0 (always the likeliest token)"),
            "top_p": number(body, "top_p", None, share, "a number above 0, and at most 1"),
            "top_k": number(body, "top_k", None, positive, "a whole number from 1", whole=True),
            "min_p": number(body, "min_p", None, lambda v: 0 <= v <= 1, "a number from 0 to 1"),
            "samples": n, "seed": secrets.randbits(31) if seed is None else seed},
        max_tokens=next((limit for limit in limits if limit is not None),
                        None if chat else DEFAULT_COMPLETION),
        stops=stops_of(body.get("stop")), stream=flag(body, "stream"),
        count=flag(options or {}, "include_usage"))


def model_of(body: dict) -> str:
    """The model that a request names."""
    if not isinstance(body.get("model"), str):
        raise wrong("model", body.get("model"), "the name of a model; GET /v1/models lists them")
    return body["model"]


def unknown_model(name: str, known: Sequence[str]) -> Refused:
    """The refusal of a name that no model here has."""
    return Refused(404, f"there is no model {name[:80]!r}{nearest(name[:80], known)}", "model",
                   "model_not_found")


def stops_of(value: object) -> list[str]:
    """The texts that end an answer."""
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if (not isinstance(stops, list) or len(stops) > MOST_STOPS
            or not all(isinstance(stop, str) and 0 < len(stop) <= 1000 for stop in stops)):
        raise wrong("stop", value, f"text, or a list of at most {MOST_STOPS} texts, none of them "
                                   "empty or over 1,000 letters")
    return stops


def prompts_of(value: object) -> list[str | list[int]]:
    """The prompts of a request: text, token ids, or a list of either."""
    whole = lambda ids: (isinstance(ids, list) and ids != [] and all(
        isinstance(i, int) and not isinstance(i, bool) for i in ids))
    prompts = [value] if isinstance(value, str) or whole(value) else value
    if not isinstance(prompts, list) or not prompts or not all(
            isinstance(prompt, str) or whole(prompt) for prompt in prompts):
        raise wrong("prompt", value, "text, token ids, or a list of one or the other")
    return prompts


def messages_of(value: object) -> list[dict]:
    """The turns of a conversation, as {"role", "content"} with plain text."""
    if not isinstance(value, list) or not value:
        raise wrong("messages", value, "a list of messages, at least one")
    found = []
    for place, message in enumerate(value):
        param = f"messages[{place}]"
        if not isinstance(message, dict):
            raise wrong(param, message, "an object with role and content")
        role, content = message.get("role"), message.get("content")
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text"
                     else None for part in content]
            if not all(isinstance(part, str) for part in parts):
                raise Refused(400, f"{param}.content has a part that is no text: these models read "
                                   "text alone", f"{param}.content", "invalid_value")
            content = "".join(parts)
        if not isinstance(content, str):
            raise wrong(f"{param}.content", content, "text")
        role = "system" if role == "developer" else role
        if role not in ("system", "user", "assistant"):
            raise wrong(f"{param}.role", role, "system, user or assistant")
        found.append({"role": role, "content": content})
    return found


class Reply:
    """The forms of one answer to a request: whole, or piece by piece."""

    def __init__(self, request: Asked):
        self.request = request
        self.name = ("chatcmpl-" if request.chat else "cmpl-") + secrets.token_hex(12)
        self.created = int(time.time())

    def _form(self, choices: list[dict], piece: bool = False, **more: object) -> dict:
        kind = "text_completion" if not self.request.chat else (
            "chat.completion.chunk" if piece else "chat.completion")
        return {"id": self.name, "object": kind, "created": self.created,
                "model": self.request.model, "choices": choices, **more}

    def whole(self, texts: list[str], reasons: list[str], usage: dict) -> dict:
        """All of it."""
        said = [{"message": {"role": "assistant", "content": one, "refusal": None}}
                if self.request.chat else {"text": one} for one in texts]
        return self._form([{"index": i, **one, "logprobs": None, "finish_reason": reason}
                           for i, (one, reason) in enumerate(zip(said, reasons))], usage=usage)

    def opening(self, index: int) -> str:
        """The event that an answer begins with; nothing of a completion."""
        return self._piece(index, {"delta": {"role": "assistant", "content": ""}}, None) * (
            self.request.chat)

    def piece(self, index: int, new: str, reason: str) -> str:
        """The events of some more text, and of the end of an answer if it has a reason."""
        if not self.request.chat:
            return self._piece(index, {"text": new}, reason or None)
        more = self._piece(index, {"delta": {"content": new}}, None) if new else ""
        return more + (self._piece(index, {"delta": {}}, reason) if reason else "")

    def closing(self, usage: dict) -> str:
        """What comes behind the last piece."""
        counted = event(self._form([], piece=True, usage=usage)) if self.request.count else ""
        return counted + "data: [DONE]\n\n"

    def _piece(self, index: int, said: dict, reason: str | None) -> str:
        choice = {"index": index, **said, "logprobs": None, "finish_reason": reason}
        more = {"usage": None} if self.request.count else {}
        return event(self._form([choice], piece=True, **more))


def event(value: dict) -> str:
    """A server-sent event that holds JSON."""
    return f"data: {json.dumps(value)}\n\n"


def usage(prompt_tokens: int, answer_tokens: int) -> dict:
    """How many tokens were read and drawn."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": answer_tokens,
            "total_tokens": prompt_tokens + answer_tokens}
