"""Where a server listens: an address of this machine or another, and a port that is free. No torch.
"""

from __future__ import annotations

import errno
import ipaddress
import socket

from modern_llm.messages import StageError

KEY = "MODERN_LLM_API_KEY"  # the variable that holds the key, which a command line would show


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach that host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_place(host: str, key: str | None) -> None:
    """StageError for a host that others reach, if they need no key."""
    if not is_loopback(host) and not key:
        raise StageError(f"--host {host} lets other machines in, and there is no API key: set one, "
                         f"`export {KEY}=…`, or leave --host out and come through `ssh -L`")


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes a free one.

    Raises:
        StageError: the port is in use or needs rights, or the host is no address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port,
                                                                type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        remedy = {errno.EADDRINUSE: f"port {port} of {host} is in use, perhaps by another "
                                    "`modern-llm serve`: choose another with --port, or --port 0 "
                                    "for any that is free",
                  errno.EACCES: f"port {port} needs an administrator's rights: choose one above "
                                "1023 with --port"}
        raise StageError(remedy.get(error.errno, f"--host {host} is no address to listen at here: "
                                                 f"{error.strerror or error}")) from error
    return listener


def address_of(listener: socket.socket) -> str:
    """The address that a browser opens."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"
