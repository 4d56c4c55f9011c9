"""Errors in OpenAI's form."""

from __future__ import annotations

import json
from typing import Any


class ApiError(Exception):
    """What a client gets instead of an answer.

    Attributes:
        status: of HTTP.
        code: a short name for programs, or None.
        param: the field at fault, or None.
        headers: to be sent along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    @property
    def kind(self) -> str:
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def json(self) -> str:
        return json.dumps(self.body())


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request is at fault."""
    return ApiError(400, message, code, param)


def worker_died() -> ApiError:
    """500: an answer was lost with the thread that was writing it."""
    return ApiError(
        500, "the generation worker died while it wrote this answer; send it again", "worker_died"
    )


def stalled(seconds: float) -> ApiError:
    """503: the worker lives but does not go on, and cannot be ended from outside."""
    return ApiError(
        503,
        f"the generation worker has written nothing for {seconds:g} s; restart the server if it "
        "does not go on by itself",
        "worker_stalled",
        None,
        {"Retry-After": "30"},
    )


def failed() -> ApiError:
    """500: this answer could not be written."""
    return ApiError(500, "the answer could not be written", "generation_failed")


def stopping() -> ApiError:
    """503: no new answers any more."""
    return ApiError(503, "the server is shutting down", "shutting_down", None, {"Retry-After": "5"})
