"""The requests that a server answers: OpenAI's, the page's own, and the page. What each may want is
checked here; the answers are the worker's.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from modern_llm.messages import say
from modern_llm.serving.batching import Job, Piece
from modern_llm.serving.protocol import (
    Refused, Reply, asked, event, messages_of, model_of, number, text, usage,
)
from modern_llm.serving.reading import attention_of, chat_prompt, completion_prompt
from modern_llm.serving.service import Desk, Service
from modern_llm.serving.worker import Unavailable

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

PAGE_RULES = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
              "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
              "frame-ancestors 'none'")


class Events(StreamingResponse):
    """Server-sent events; `close` is called behind the last, or when nobody reads on."""

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream",
                         headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self.close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.close()


async def pieces_of(job: Job, queue: asyncio.Queue) -> AsyncIterator[Piece]:
    """What the worker tells of a job, up to the end of its last answer. Refused in place of what
    went wrong.
    """
    left = job.rows
    while left:
        piece = await queue.get()
        if isinstance(piece, Exception):
            raise refused_for(piece)
        left -= bool(piece.finish)
        yield piece


def refused_for(error: Exception) -> Refused:
    """What a client is told of an error on this side."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, Unavailable):
        return Refused(503, str(error), code="unavailable", kind="server_error", wait=2)
    return Refused(500, f"the model could not answer: {error}", code="model_error",
                   kind="server_error")


async def unless_gone(request: Request, wanted: Awaitable):
    """What is awaited. ClientDisconnect as soon as nobody waits for it any more."""
    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(wanted), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


async def generated(service: Service, desk: Desk, request: Request, chat: bool) -> Response:
    """The answers of a model, whole or piece by piece."""
    limits, loop, queue = service.worker.limits, asyncio.get_running_loop(), asyncio.Queue()
    wanted = asked(await service.body(request), chat, limits.max_new_tokens, limits.rows)

    def tell(piece: Piece | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and everybody with it
            loop.call_soon_threadsafe(queue.put_nowait, piece)

    leave, job, handed_over = desk.enter(), None, False

    def close() -> None:
        if job is not None:
            job.cancelled = True
        leave()

    try:
        job = await asyncio.to_thread(service.job, wanted, tell)
        read = sum(map(len, job.prompts))
        service.worker.submit(service.served(wanted.model), job)
        reply, pieces = Reply(wanted), pieces_of(job, queue)
        if wanted.stream:
            first = await unless_gone(request, anext(pieces))
            handed_over = True
            return Events(written(reply, job, read, first, pieces), close)

        async def all_of() -> list[Piece]:
            return [piece async for piece in pieces]

        found = await unless_gone(request, all_of())
    finally:
        if not handed_over:
            close()
    texts, ends = [""] * job.rows, [Piece(0, "", 0)] * job.rows
    for piece in found:
        texts[piece.index] += piece.text
        ends[piece.index] = piece
    drawn = sum(end.tokens for end in ends)
    return JSONResponse(reply.whole(texts, [end.finish for end in ends], usage(read, drawn)))


async def written(reply: Reply, job: Job, read: int, first: Piece,
                  rest: AsyncIterator[Piece]) -> AsyncIterator[str]:
    """The events of a reply. What goes wrong is the last one."""
    drawn = [0] * job.rows
    for index in range(job.rows):
        if opening := reply.opening(index):
            yield opening
    drawn[first.index] = first.tokens
    yield reply.piece(first.index, first.text, first.finish)
    try:
        async for piece in rest:
            drawn[piece.index] = piece.tokens
            yield reply.piece(piece.index, piece.text, piece.finish)
        yield reply.closing(usage(read, sum(drawn)))
    except Refused as refused:
        yield event(refused.body)


async def listed(service: Service, desk: Desk, request: Request) -> Response:
    """The models, or the one whose name the address has."""
    if name := request.path_params.get("name"):
        return JSONResponse(await asyncio.to_thread(service.described, name))
    models = await asyncio.to_thread(lambda: [service.described(name) for name in service.models])
    return JSONResponse({"object": "list", "data": models, "run": service.run,
                         "verifier": service.worker.judge is not None})


async def scored(service: Service, desk: Desk, request: Request) -> Response:
    """How likely an answer to a problem is right, as the verifier sees it, after each step."""
    body = await service.body(request)
    problem, answer = text(body, "problem"), text(body, "answer")
    if service.worker.judge is None:
        raise Refused(404, f"{service.run} has no verifier: train one, `modern-llm run --stage "
                           "verifier`", code="no_verifier")

    def score() -> list[tuple[str, float]]:
        try:
            return service.worker.scorer.running(problem, answer)
        except ValueError as error:  # of the words, which do not fit its context
            raise Refused(400, str(error), "answer", "invalid_value") from error

    strip = await asked_of(service, desk, request, score)
    return JSONResponse({"score": strip[-1][1],
                         "running": [{"text": piece, "score": value} for piece, value in strip]})


async def looked_at(service: Service, desk: Desk, request: Request) -> Response:
    """What the tokens of an answer were written from, see `reading.attention_of`."""
    body = await service.body(request)
    served, answer = service.served(model_of(body)), text(body, "answer")
    layer, head = (number(body, name, None, lambda v: v >= 0, "a whole number from 0", whole=True)
                   for name in ("layer", "head"))
    messages = messages_of(body["messages"]) if "messages" in body else []
    prompt = "" if messages else text(body, "prompt")

    def look() -> dict:
        ids = chat_prompt(served, messages) if messages else completion_prompt(served, prompt)
        return attention_of(service.worker, served, ids, answer, layer, head)

    return JSONResponse(await asked_of(service, desk, request, look))


async def asked_of(service: Service, desk: Desk, request: Request, function: Callable):
    """What a function returns that uses the models."""
    leave = desk.enter()
    try:
        return await unless_gone(request, asyncio.wrap_future(service.worker.ask(function)))
    finally:
        leave()


async def page(request: Request) -> Response:
    """The page to chat with the models; it asks for the key itself."""
    content = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return HTMLResponse(content, headers={"Content-Security-Policy": PAGE_RULES,
                                          "Cache-Control": "no-store"})


def refusal(refused: Refused) -> Response:
    """A refusal as OpenAI writes one."""
    more = {"WWW-Authenticate": "Bearer"} if refused.status == 401 else (
        {"Connection": "close"} if refused.status in (408, 413) else {})
    return JSONResponse(refused.body, refused.status, {**refused.headers, **more})


def application(service: Service) -> Starlette:
    """The server's answers to all addresses."""
    desk = Desk(service.worker.limits.requests)

    def endpoint(function: Callable) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            try:
                service.check_sender(request)
                return await function(service, desk, request)
            except Refused as refused:
                return refusal(refused)
            except ClientDisconnect:
                return Response(status_code=499)  # which nobody reads
            except Exception as error:
                if not isinstance(error, Unavailable):
                    say(f"{request.url.path}: {type(error).__name__}: {error}")
                return refusal(refused_for(error))

        return answer

    async def elsewhere(request: Request, error: HTTPException) -> Response:
        said = (f"{request.method} {request.url.path} is not answered here: GET /v1/models, POST "
                "/v1/chat/completions and POST /v1/completions are")
        return refusal(Refused(error.status_code, said, code="unknown_address"))

    chat, plain = (functools.partial(generated, chat=chat) for chat in (True, False))
    posts = {"/v1/chat/completions": chat, "/v1/completions": plain, "/score": scored,
             "/attention": looked_at}
    return Starlette(
        routes=[Route("/", page), Route("/v1/models", endpoint(listed)),
                Route("/v1/models/{name}", endpoint(listed)),
                *(Route(path, endpoint(function), methods=["POST"])
                  for path, function in posts.items())],
        exception_handlers={HTTPException: elsewhere})
