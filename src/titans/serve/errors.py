"""The answer to a request that cannot be met, in the form of OpenAI's errors."""

from __future__ import annotations

import errno
from typing import Any

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP, 4xx where the request is to blame.
        message: what is wrong, and the remedy.
        param: the field that is wrong. code: a short name that programs compare.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """What JSON says of it."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def failure_of(error: Exception) -> ApiError:
    """What a client learns of an error that is the server's own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ApiError(507, "the server's disk is full: try again later", code="disk_full")
    return ApiError(500, "the server failed; its log says where", code="server_error")


def too_busy(message: str) -> ApiError:
    return ApiError(429, message, code="too_busy")
