"""How a server is run: bounds and addresses. No torch here."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from emosteer.base.errors import UsageError

#: Where a key is looked for unless an option gives it: a command line is shown in lists of processes.
KEY_VARIABLE = "EMOSTEER_API_KEY"


@dataclass(frozen=True)
class ServeSettings:
    """Everything that bounds a server.

    host, port: where it listens; api_key: what every request has to bring, None for nothing; cors: origins whose pages may call it.
    max_batch: replies written at once; max_queue: replies that wait for their turn; max_tokens: the longest reply; max_body: bytes of a
    request; timeout: seconds from a request's arrival to its last token; grace: seconds that running replies have once it is told to
    stop; cache_gb: memory for keys and values, in GiB. judge: reads replies for the playground and users' turns for a personality.
    """

    host: str = "127.0.0.1"
    port: int = 8017
    api_key: str | None = None
    cors: tuple[str, ...] = ()
    max_batch: int = 64
    max_queue: int = 256
    max_tokens: int = 1024
    max_body: int = 1_000_000
    timeout: float = 300.0
    grace: float = 20.0
    cache_gb: float = 4.0
    judge: str = "embedded"

    def __post_init__(self) -> None:
        checks = (
            (0 <= self.port <= 65535, f"--port must lie between 0 and 65535, found {self.port}"),
            (1 <= self.max_batch <= 1024, f"--max-batch must lie between 1 and 1024, found {self.max_batch}"),
            (0 <= self.max_queue <= 100_000, f"--max-queue must lie between 0 and 100000, found {self.max_queue}"),
            (self.max_tokens >= 1, f"--max-tokens must be at least 1, found {self.max_tokens}"),
            (1000 <= self.max_body <= 10**9, f"--max-body must lie between 1000 bytes and a gigabyte, found {self.max_body}"),
            (0 < self.timeout <= 86400, f"--timeout must lie between 0 and 86400 seconds, found {self.timeout}"),
            (0 <= self.grace <= 3600, f"--grace must lie between 0 and 3600 seconds, found {self.grace}"),
            (0 < self.cache_gb <= 10_000, f"--cache-gb must be above 0, found {self.cache_gb}"),
            (self.api_key is None or self.api_key.strip() != "", "the API key is empty; leave it out, or give one"),
            (
                self.api_key is None or self.api_key == self.api_key.strip(),
                "the API key begins or ends with white space, which no client can bring in a header; leave that out",
            ),
            (self.api_key is None or self.api_key.isascii(), "the API key must be plain ASCII: it comes in a header"),
            (
                self.is_local or self.api_key is not None,
                f"{self.host} can be reached from other machines; give an API key ({KEY_VARIABLE}=..., or --api-key)",
            ),
        )
        for fine, message in checks:
            if not fine:
                raise UsageError(message)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
