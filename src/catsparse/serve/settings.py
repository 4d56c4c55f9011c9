"""What a server allows."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from ..errors import CatsparseError


@dataclass(frozen=True)
class Settings:
    """Limits and addresses of a server.

    Attributes:
        name: what the API calls the model.
        host: address to listen on.
        port: 0 for any that is free.
        api_key: what clients must send; None for no check.
        max_tokens: new tokens of one answer, at most.
        max_body: bytes of one request's body, at most.
        max_requests: requests in flight, at most; more are refused with 429.
        max_batch: answers written at a time; None for 16 on a CPU, up to which the sparse kernels
            serve, and 64 on a GPU.
        batching: continuous batching; None for where it works.
        dense: run the dense model for everything.
        grace: seconds that a shutdown waits for answers under way.
        read_seconds: within which a body must have come.
        write_seconds: for which a client may leave what was sent unread.
        stall_timeout: seconds without a step or token, while an answer is under way, after which
            the worker counts as stalled; 0 for never.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_tokens: int = 1024
    max_body: int = 1 << 20
    max_requests: int = 256
    max_batch: int | None = None
    batching: bool | None = None
    dense: bool = False
    grace: float = 30.0
    read_seconds: float = 30.0
    write_seconds: float = 30.0
    stall_timeout: float = 300.0

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.strip():
            raise CatsparseError("the API key is empty; give one, or leave it out")
        if not self.name:
            raise CatsparseError("the model's name is empty; give one with --name")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
