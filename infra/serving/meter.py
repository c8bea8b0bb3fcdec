"""Figures of `deal serve` for Prometheus: requests and their seconds, and rows that the prediction log lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper limits of the histogram of seconds."""


@dataclass
class Measured:
    """What is known of a request when it ends."""

    status: int = 200
    version: str = ""


class _Dropped(Collector):
    """What the server left out, as others count it."""

    def __init__(self, num_dropped: Callable[[], int], num_copies_dropped: Callable[[], int]) -> None:
        self._num_dropped = num_dropped
        self._num_copies_dropped = num_copies_dropped

    def collect(self) -> Iterable[CounterMetricFamily]:
        """Return the figures of this moment."""
        lost, left_out = "Answers that are missing in the prediction log.", "Copies that no shadow has answered."
        return [
            CounterMetricFamily("deal_predictions_dropped", lost, value=self._num_dropped()),
            CounterMetricFamily("deal_shadow_requests_dropped", left_out, value=self._num_copies_dropped()),
        ]


class Meter:
    """Counts the requests of one server.

    `num_dropped` returns the rows that the prediction log has lost, `num_copies_dropped` the copies of requests that no
    shadow has answered.
    """

    def __init__(
        self, num_dropped: Callable[[], int] = lambda: 0, num_copies_dropped: Callable[[], int] = lambda: 0
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Dropped(num_dropped, num_copies_dropped))
        self._requests = Counter(
            "deal_requests", "Requests that ended.", ["path", "status", "version"], registry=self._registry
        )
        self._seconds = Histogram(
            "deal_request_seconds", "Seconds of a request.", ["path"], buckets=BUCKETS, registry=self._registry
        )
        self._open = Gauge("deal_requests_in_flight", "Requests in flight.", registry=self._registry)

    @contextmanager
    def measured(self, path: str) -> Iterator[Measured]:
        """Count a request, with the status and the version that the caller sets."""
        begun, found = time.perf_counter(), Measured()
        self._open.inc()
        try:
            yield found
        except BaseException:
            found.status = 500
            raise
        finally:
            self._open.dec()
            self._requests.labels(path, str(found.status), found.version).inc()
            self._seconds.labels(path).observe(time.perf_counter() - begun)

    def page(self) -> tuple[bytes, int, dict[str, str]]:
        """Return body, status and headers of GET /metrics."""
        return generate_latest(self._registry), 200, {"Content-Type": CONTENT_TYPE_LATEST}
