"""The server's life: it listens, answers, and ends cleanly when it is told to."""

from __future__ import annotations

import signal
import socket
import threading

import uvicorn

from modern_llm.messages import say
from modern_llm.serving.app import application
from modern_llm.serving.places import address_of
from modern_llm.serving.service import Service

GRACE = 3.0  # seconds that answers under way have when the server is told to end


class Server(uvicorn.Server):
    """Uvicorn, which, when it ends, first lets the worker end its answers.

    Args:
        service: what is served.
    """

    def __init__(self, service: Service):
        super().__init__(uvicorn.Config(
            application(service), log_level="error", access_log=False, lifespan="off", ws="none",
            http="h11", loop="asyncio", server_header=False, proxy_headers=False,
            timeout_graceful_shutdown=2 * GRACE))
        self.worker = service.worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.worker.drain(GRACE)
        await super().shutdown(sockets)


def serve(service: Service, listener: socket.socket) -> None:
    """Say where, and answer requests until SIGINT or SIGTERM."""
    server = Server(service)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again, at its end
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    say(f"{service.run}: {', '.join(service.models)} at {address_of(listener)} (Ctrl-C ends)")
    service.worker.start()
    try:
        server.run(sockets=[listener])
    finally:
        service.worker.close()
        service.worker.join(timeout=10)
