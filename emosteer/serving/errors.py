"""Errors of the protocol: one object for each, with its HTTP status. No torch here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from emosteer.base.errors import EmosteerError


class RequestError(Exception):
    """A request that is refused. param: the field that is wrong; code: for programs."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(_sendable(message))
        self.status, self.param, self.code = status, None if param is None else _sendable(param), code

    @property
    def kind(self) -> str:
        """The protocol's word for the status."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """The error object."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def _sendable(text: str) -> str:
    """A text that may quote what a client sent: JSON can name halves of surrogate pairs, which UTF-8 has not."""
    return text.encode("utf-8", "backslashreplace").decode()


@contextlib.contextmanager
def refusing(param: str, code: str | None = None) -> Iterator[None]:
    """What is wrong with a field is the client's business: within it, errors of ours become refusals that name the field."""
    try:
        yield
    except EmosteerError as error:
        raise RequestError(str(error), param=param, code=code) from None


def busy(waiting: int, what: str = "replies") -> RequestError:
    """The refusal of a request that would have to wait too long. what: the things that are waiting."""
    return RequestError(f"{waiting} {what} are waiting already; try again later", status=429, code="queue_full")


def too_late(seconds: float) -> RequestError:
    """What is said of a request whose answer was not finished in time."""
    return RequestError(f"the answer was not finished within {seconds:g} seconds (--timeout)", status=503, code="timeout")


def stopping() -> RequestError:
    """What is said once the server has been told to stop."""
    return RequestError("the server is stopping", status=503, code="stopping")
