"""What `/metrics` shows, in Prometheus' text format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


class Metrics:
    """The figures of one server; counters are safe from several threads."""

    def __init__(self) -> None:
        """Begin with zeros."""
        self.registry = CollectorRegistry()
        into = self.registry
        self._passes = Histogram(
            "turbochain_pass_seconds",
            "Seconds of one pass of the chain",
            ["model", "steps"],
            buckets=SECONDS,
            registry=into,
        )
        self._pictures = Counter("turbochain_pictures", "Pictures drawn", ["model"], registry=into)
        self._answers = Counter("turbochain_answers", "Answers by route and status", ["route", "status"], registry=into)
        self._waiting = Gauge("turbochain_waiting", "Pictures in the queue", registry=into)
        self._skipped = Counter("turbochain_skipped", "Requests of sockets that a newer one replaced", registry=into)

    def passed(self, model: str, steps: int, seconds: float, pictures: int) -> None:
        """Count a pass of the chain."""
        self._passes.labels(model, steps).observe(seconds)
        self._pictures.labels(model).inc(pictures)

    def answered(self, route: str, status: int) -> None:
        """Count an answer; `route`: the path as the API declares it, so that clients cannot invent labels."""
        self._answers.labels(route, status).inc()

    def skipped(self) -> None:
        """Count a socket's request that was replaced by a newer one."""
        self._skipped.inc()

    def text(self, waiting: int) -> bytes:
        """Return all of it as text; `waiting`: how many pictures are in the queue."""
        self._waiting.set(waiting)
        return generate_latest(self.registry)
