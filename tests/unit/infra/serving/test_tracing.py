"""The trace of a request has its lineage, task and version, and continues the trace of its client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from infra.serving import tracing


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield exporter
    provider.shutdown()


def test_facts_that_tasks_of_a_request_note_are_on_its_span(spans: InMemorySpanExporter) -> None:
    async def work(version: str) -> None:
        await asyncio.sleep(0)
        tracing.note(version=version, engine="http://gpu-1:8000")

    async def request(version: str) -> None:
        parent = f"00-{int(version):032x}-{1:016x}-01"
        with tracing.traced("/invocations", {"traceparent": parent}):
            await asyncio.ensure_future(work(version))

    async def both() -> None:
        await asyncio.gather(request("3"), request("4"))

    asyncio.run(both())
    found = {span.context.trace_id: dict(span.attributes or {}) for span in spans.get_finished_spans()}
    assert {number: facts["deal.version"] for number, facts in found.items()} == {3: "3", 4: "4"}
    assert all(facts["deal.engine"] == "http://gpu-1:8000" for facts in found.values())


def test_without_the_extra_nothing_is_traced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tracing, "IS_THERE", False)
    monkeypatch.delattr(tracing, "trace")
    monkeypatch.setenv(tracing.ENDPOINT, "http://127.0.0.1:9")
    with tracing.sending_traces(), tracing.traced("/invocations", {}):
        tracing.note(version="3")
