"""What a server counts, for Prometheus. No torch here."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

#: Bounds of histograms, in seconds.
_SHORT = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_LONG = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 300.0)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter("emosteer_requests", "Requests answered, by path and HTTP status.", ("path", "status"), registry=own)
        self.tokens = Counter("emosteer_tokens_written", "Tokens written.", registry=own)
        self.cancelled = Counter("emosteer_replies_cancelled", "Replies let go before their end, by why.", ("why",), registry=own)
        self.first = Histogram("emosteer_first_token_seconds", "From a request's arrival to its first token.", buckets=_LONG, registry=own)
        self.waited = Histogram("emosteer_queue_seconds", "From a request's arrival to its turn.", buckets=_LONG, registry=own)
        self.steps = Histogram("emosteer_step_seconds", "One step of all running replies.", buckets=_SHORT, registry=own)
        self._running = Gauge("emosteer_replies_running", "Replies that are being written.", registry=own)
        self._waiting = Gauge("emosteer_replies_waiting", "Replies that wait for their turn.", registry=own)
        self._rows = Gauge("emosteer_rows", "Rows of the model's batch.", registry=own)

    def watch(self, running: Callable[[], float], waiting: Callable[[], float], rows: Callable[[], float]) -> None:
        """Where the numbers of the moment come from."""
        self._running.set_function(running)
        self._waiting.set_function(waiting)
        self._rows.set_function(rows)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)
