"""Figures of a server for Prometheus."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from unialign_jax.serving.engine import Engine

SIZES = (1, 2, 4, 8, 16, 32, 64)
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counts batches as they are made, and reads the rest of the engine when it is asked.

    Attributes:
      content_type: of `text()`.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine | None = None):
        self._registry, self._engine = CollectorRegistry(), engine
        made = {"registry": self._registry, "namespace": "unialign"}
        self._sizes = Histogram("batch_size", "Samples of a batch", ["task"], buckets=SIZES, **made)
        self._seconds = Histogram("batch_seconds", "Seconds of a batch", ["task"], buckets=SECONDS, **made)
        self._parts = Histogram(
            "part_seconds",
            "Seconds of a part of a batch: encode_prompts, encode_images, sample, write_text, decode_images",
            ["task", "part"],
            buckets=SECONDS,
            **made,
        )
        self._waits = Histogram("wait_seconds", "Seconds of a sample in the queue", ["task"], buckets=SECONDS, **made)
        self._refusals = Counter("refused", "Requests that were not taken", ["reason"], **made)
        self._failures = Counter("failed_requests", "Requests that failed inside of the server", **made)
        self._registry.register(self)

    def watch(self, engine: Engine) -> None:
        """Names the engine whose queue is shown."""
        self._engine = engine

    def observe(self, task: str, waits: list[float], seconds: float, parts: Mapping[str, float]) -> None:
        """A batch; what an `Engine` calls."""
        self._sizes.labels(task).observe(len(waits))
        self._seconds.labels(task).observe(seconds)
        for wait in waits:
            self._waits.labels(task).observe(wait)
        for part, taken in parts.items():
            self._parts.labels(task, part).observe(taken)

    def refused(self, reason: str) -> None:
        """A request that was not taken."""
        self._refusals.labels(reason).inc()

    def failed(self) -> None:
        """A request that failed, through no fault of its own: a 500."""
        self._failures.inc()

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks for the engine's figures."""
        if self._engine is None:
            return
        counts = self._engine.counts()
        yield GaugeMetricFamily("unialign_waiting", "Samples in the queue", counts.waiting)
        yield GaugeMetricFamily("unialign_waiting_pixels", "Pixels of images in the queue", counts.waiting_pixels)
        yield GaugeMetricFamily("unialign_working", "Samples in the making", counts.working)
        for name, about in (("done", "Samples made"), ("failed", "Samples that failed")):
            family = CounterMetricFamily(f"unialign_{name}", about, labels=["task"])
            for task, count in getattr(counts, name).items():
                family.add_metric([task], count)
            yield family
        for name, about in (
            ("rejected", "Samples that found the queue full"),
            ("cancelled", "Samples whose client left"),
            ("expired", "Samples that waited too long"),
        ):
            yield CounterMetricFamily(f"unialign_{name}", about, getattr(counts, name))

    def text(self) -> bytes:
        """All figures, as Prometheus reads them."""
        return generate_latest(self._registry)
