"""What the server counts, in Prometheus' format: answers by protocol and outcome, times, batches, what waits."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10)
SIZES = (1, 2, 4, 8, 16, 32, 64)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Of one server."""

    def __init__(self):
        self.registry = CollectorRegistry()
        labels = ("protocol", "outcome")
        self.answers = Counter(
            "openvla_answers", "Observations that were answered or refused", labels, registry=self.registry
        )
        self.seconds = Histogram(
            "openvla_answer_seconds",
            "From an observation's arrival to its action, waiting included",
            ("protocol",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.batch = Histogram(
            "openvla_batch_size",
            "Observations that the policy answered at once",
            buckets=SIZES,
            registry=self.registry,
        )
        self.policy = Histogram(
            "openvla_policy_seconds", "Of the policy, for a batch", buckets=SECONDS, registry=self.registry
        )
        self.clamped = Counter("openvla_clamped", "Chunks with actions that were clamped", registry=self.registry)
        self.in_flight = Gauge("openvla_in_flight", "Observations that are being answered", registry=self.registry)
        self.ready = Gauge("openvla_ready", "1 if the policy acts", registry=self.registry)

    def note_batch(self, size: int, seconds: float) -> None:
        self.batch.observe(size)
        self.policy.observe(seconds)

    def note_answer(self, protocol: str, outcome: str, seconds: float) -> None:
        """outcome: "ok", or the name of what was raised."""
        self.answers.labels(protocol, outcome).inc()
        if outcome == "ok":
            self.seconds.labels(protocol).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
