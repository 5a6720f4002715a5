"""Errors of the protocol: one object for each, with its HTTP status. No torch here."""

from __future__ import annotations

from typing import Any


class RequestError(Exception):
    """A request that is refused. param: the field that is wrong; code: for programs."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def kind(self) -> str:
        """The protocol's word for the status."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """The error object."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def busy(waiting: int, what: str = "replies") -> RequestError:
    """The refusal of a request that would have to wait too long. what: the things that are waiting."""
    return RequestError(f"{waiting} {what} are waiting already; try again later", status=429, code="queue_full")


def too_late(seconds: float) -> RequestError:
    """What is said of a request whose answer was not finished in time."""
    return RequestError(f"the answer was not finished within {seconds:g} seconds (--timeout)", status=503, code="timeout")


def stopping() -> RequestError:
    """What is said once the server has been told to stop."""
    return RequestError("the server is stopping", status=503, code="stopping")
