"""What every request has to pass: the right host and key, a body that is small enough and comes in time, no more replies than there is
room for. No torch here."""

from __future__ import annotations

import asyncio
import hmac

from starlette.requests import ClientDisconnect, Request

from emosteer.serving.errors import RequestError
from emosteer.serving.settings import ServeSettings

#: Seconds in which a request's body has to be there.
BODY_TIME = 30.0
#: What the page itself may do: load its own parts and call its own server.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
#: Headers of every answer.
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
#: Paths that need no key: they say nothing about anybody's requests.
OPEN_PATHS = ("/", "/healthz", "/playground.js", "/playground.css")


def check_request(request: Request, settings: ServeSettings) -> None:
    """Refuses who may not ask.

    Without a key only this machine may ask, and no page of another origin through its user's browser: the name under which the server
    was called must be local (a name that was pointed here would be another), and so must the page's origin, or be one of those that CORS
    was opened for.

    Raises:
        RequestError: with the status that says why.
    """
    if settings.api_key is None:
        host = request.headers.get("host", "")
        if _name_of(host) not in ("localhost", "127.0.0.1", "::1", settings.host):
            raise RequestError(
                f"expected a local host name, found '{host[:60]}'; start the server with an API key to be called so", status=403
            )
        origin = request.headers.get("origin")
        opened = origin in settings.cors or "*" in settings.cors
        if origin is not None and not opened and origin.partition("://")[2] != host:
            raise RequestError(f"pages of {origin[:80]} may not call this server (--cors)", status=403)
        return
    if request.url.path in OPEN_PATHS or request.method == "OPTIONS":
        return
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), settings.api_key.encode()):
        raise RequestError("the API key is missing or wrong; expected 'Authorization: Bearer KEY'", status=401, code="invalid_api_key")


def _name_of(host: str) -> str:
    """A host header without its port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def check_number(n: int, prompts: int, settings: ServeSettings) -> None:
    """Refuses a request that no waiting would make room for.

    Args:
        n: replies to each of its prompts.

    Raises:
        RequestError: if these are more than may run and wait.
    """
    most = settings.max_batch + settings.max_queue
    if n * prompts > most:
        each = f"n={n} for each of {prompts} prompts" if prompts > 1 else f"n={n}"
        message = f"{each} asks for {n * prompts} replies; expected at most {most}, which may run and wait (--max-batch, --max-queue)"
        raise RequestError(message, param="n" if n > 1 else "prompt")


async def read_body(request: Request, settings: ServeSettings) -> bytes:
    """A request's body.

    Raises:
        RequestError: if it is not announced as JSON, too large, or does not come in time.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # other kinds can be sent by any page without asking first
        raise RequestError(f"expected Content-Type: application/json, found '{kind[:60]}'", status=415)
    size = request.headers.get("content-length", "0")
    too_large = RequestError(f"the request is larger than {settings.max_body} bytes (--max-body)", status=413, code="request_too_large")
    if size.isdigit() and int(size[:20]) > settings.max_body:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIME):
            async for chunk in request.stream():
                body += chunk
                if len(body) > settings.max_body:
                    raise too_large
    except TimeoutError:
        raise RequestError(f"the request's body did not come within {BODY_TIME:g} seconds", status=408) from None
    except ClientDisconnect:
        raise RequestError("the client left", status=499) from None
    return bytes(body)
