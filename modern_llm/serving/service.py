"""What is served, and who may ask for what: the sender, the size and the form of a request, and how
many are under way.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.requests import Request

from modern_llm.models.generation import Sampling
from modern_llm.serving.batching import Job, Piece
from modern_llm.serving.places import is_loopback
from modern_llm.serving.protocol import Asked, Refused, parse, unknown_model
from modern_llm.serving.reading import chat_prompt, completion_prompt, endings
from modern_llm.serving.worker import Served, Worker

SECONDS_OF_A_BODY = 30  # a client that sends slower is refused
READ_AND_DROPPED = 10  # times the limit of a body is read, so that its sender hears the refusal


def host_of(request: Request) -> str:
    """The host that a request is addressed to; "" where it says none."""
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""


@dataclass(frozen=True)
class Service:
    """What is served, by whom, and to whom.

    Args:
        run: what the models are of, for the page.
        models: by the names that requests call them by.
        worker: writes the answers.
        key: that requests must bring; None is none, and then they must come to an address of this
            machine.
    """

    run: str
    models: dict[str, Served]
    worker: Worker
    key: str | None = None

    def served(self, name: str) -> Served:
        """The model of that name; Refused if there is none."""
        if name not in self.models:
            raise unknown_model(name, list(self.models))
        return self.models[name]

    def described(self, name: str) -> dict:
        """A model, as the list of models has it."""
        served = self.served(name)
        made = int((served.folder / "config.json").stat().st_mtime)
        return {"id": name, "object": "model", "created": made, "owned_by": "modern_llm",
                "chat": served.chats, "context_length": served.context}

    def check_sender(self, request: Request) -> None:
        """Refused without the key, or, where none is needed, if a page of elsewhere asks."""
        if self.key is not None:
            given = request.headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
                raise Refused(401, "this server wants its API key, as a header `Authorization: "
                                   "Bearer KEY`", code="invalid_api_key")
        elif not is_loopback(host := host_of(request)):
            raise Refused(403, f"{host[:80]!r} is no name of this machine, and without an API key "
                               "only its own programs are answered", code="wrong_host")

    async def body(self, request: Request) -> dict:
        """The JSON object that was sent. Refused if it is none, or too large, or too slow."""
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, f"Content-Type is {kind[:60]!r}, and should be application/json")
        most, data, size = self.worker.limits.body_bytes, bytearray(), 0

        async def read() -> None:
            nonlocal size
            async for chunk in request.stream():
                size += len(chunk)
                if size <= most:
                    data.extend(chunk)
                elif size > READ_AND_DROPPED * most:
                    break

        try:
            await asyncio.wait_for(read(), SECONDS_OF_A_BODY)
        except asyncio.TimeoutError as error:
            raise Refused(408, f"the body did not come within {SECONDS_OF_A_BODY} s") from error
        if size > most:
            raise Refused(413, f"the body has more than {most:,} bytes, the limit of this server",
                          code="request_too_large")
        return parse(bytes(data))

    def job(self, wanted: Asked, tell: Callable[[Piece | Exception], None]) -> Job:
        """A request as the worker takes it."""
        served, limits = self.served(wanted.model), self.worker.limits
        prompts = ([chat_prompt(served, wanted.messages)] if wanted.chat else
                   [completion_prompt(served, prompt) for prompt in wanted.prompts])
        ending, stop = endings(served, wanted.chat)
        most = limits.max_new_tokens if wanted.max_tokens is None else wanted.max_tokens
        sampling = Sampling(max_new_tokens=most, eos_id=ending, stop=stop, **wanted.sampling)
        return Job(prompts, sampling, tell, wanted.stops, time.monotonic() + limits.seconds)


class Desk:
    """How many requests are under way, of so many."""

    def __init__(self, most: int):
        self.most, self.open = most, 0

    def enter(self) -> Callable[[], None]:
        """Count one more; what is returned counts it off, once. Refused if there are too many."""
        if self.open >= self.most:
            raise Refused(429, f"{self.open} requests are under way, as many as this server takes: "
                               "try again in a second", code="rate_limit_exceeded",
                          kind="rate_limit_error", wait=1)
        self.open += 1
        return functools.cache(self._leave)

    def _leave(self) -> None:
        self.open -= 1
