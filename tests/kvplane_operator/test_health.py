"""What is served over HTTP costs the event loop little."""

import asyncio
import threading
from collections.abc import Iterable

import pytest
from prometheus_client import Metric, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from kvplane_operator import health


class Watched(Collector):
    """One metric, and the threads that asked for it."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def collect(self) -> Iterable[Metric]:
        self.threads.append(threading.get_ident())
        yield GaugeMetricFamily("kvplane_test", "A test.", value=1)


def test_metrics_are_taken_on_the_loop_and_put_into_words_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a loop of its own, as a thread takes real time."""
    words: list[int] = []

    def render(registry: Collector) -> bytes:
        words.append(threading.get_ident())
        return generate_latest(registry)

    monkeypatch.setattr(health, "generate_latest", render)
    watched = Watched()
    loop = asyncio.new_event_loop()
    try:
        text = loop.run_until_complete(health.exposition(watched))
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()
    assert text == b"# HELP kvplane_test A test.\n# TYPE kvplane_test gauge\nkvplane_test 1.0\n"
    assert watched.threads == [threading.get_ident()]
    assert len(words) == 1
    assert words != watched.threads
