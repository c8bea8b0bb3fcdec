"""The trace of a request for OpenTelemetry, with version, task and engine.

Without the extra `otel` nothing is traced. With it, the variables of OpenTelemetry say where traces go, such as
OTEL_EXPORTER_OTLP_ENDPOINT; without that variable they go nowhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

try:
    from opentelemetry import propagate, trace
except ImportError:
    IS_THERE = False
else:
    IS_THERE = True

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@contextmanager
def sending_traces() -> Iterator[None]:
    """Send traces while the block runs, if the extra is installed and OTEL_EXPORTER_OTLP_ENDPOINT is set."""
    if not IS_THERE or not os.environ.get(ENDPOINT):
        yield
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "deal-serve"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        provider.shutdown()


@contextmanager
def traced(path: str, headers: Mapping[str, str]) -> Iterator[None]:
    """Trace a request. It is a part of its client's trace if the headers name one."""
    if not IS_THERE:
        yield
        return
    tracer = trace.get_tracer("deal.serving")
    with tracer.start_as_current_span(f"POST {path}", context=propagate.extract(headers), kind=trace.SpanKind.SERVER):
        yield


def note(**facts: str) -> None:
    """Note facts of the request that is answered now."""
    if IS_THERE:
        trace.get_current_span().set_attributes({f"deal.{name}": value for name, value in facts.items()})
