"""What the server counts, for Prometheus: the names that vLLM gives these figures, after `teal:`."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from teal_fast.server.asked import Usage

FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
BETWEEN = (0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 1)
WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
SHARES = tuple(i / 20 for i in range(1, 20))


class Metrics:
    """Counted on the event loop. source: the service, whose worker says how many requests run and wait."""

    def __init__(self, source: Any):
        self.registry = registry = CollectorRegistry()
        Gauge("teal:num_requests_running", "Requests in the engine", registry=registry).set_function(
            lambda: int(source.worker.running is not None)
        )
        Gauge("teal:num_requests_waiting", "Requests in the queue", registry=registry).set_function(
            lambda: source.worker.waiting
        )
        self.prompt = Counter("teal:prompt_tokens", "Tokens of prompts", registry=registry)
        self.cached = Counter("teal:cached_tokens", "Tokens of prompts from the prefix cache", registry=registry)
        self.generated = Counter("teal:generation_tokens", "Tokens of answers", registry=registry)
        self.first = Histogram(
            "teal:time_to_first_token_seconds", "From queue to first token", registry=registry, buckets=FIRST
        )
        self.between = Histogram(
            "teal:inter_token_latency_seconds", "Between tokens of an answer", registry=registry, buckets=BETWEEN
        )
        self.whole = Histogram(
            "teal:e2e_request_latency_seconds", "From queue to last token", registry=registry, buckets=WHOLE
        )
        self.ended = Counter(
            "teal:request_success", "Answers by how they ended", ["finished_reason"], registry=registry
        )
        self.refused = Counter("teal:request_errors", "Refused requests by HTTP status", ["status"], registry=registry)
        self.achieved = Histogram(
            "teal:achieved_sparsity_ratio", "Weight bytes skipped by decoding", registry=registry, buckets=SHARES
        )

    def token(self, seconds: float, first: bool) -> None:
        (self.first if first else self.between).observe(seconds)

    def answer(self, usage: Usage, reason: str, seconds: float) -> None:
        self.prompt.inc(usage.prompt_tokens)
        self.cached.inc(usage.cached_tokens)
        self.generated.inc(usage.completion_tokens)
        self.ended.labels(reason).inc()
        self.whole.observe(seconds)
        if usage.completion_tokens > 1:
            self.achieved.observe(usage.achieved_sparsity)

    def text(self) -> bytes:
        return generate_latest(self.registry)
