"""Rank 0 is told to stop: answers under way end in time or with an error that says to retry, and the workers stay."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ring.processes import Processes, Stream, processes
from tests.ring.tiny import SERVED, VOCABULARY, build, wrong


@pytest.fixture(scope="module")
def model() -> Any:
    return build(SERVED[0])


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return folder


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def under_way(ring: Processes, *streams: Stream) -> None:
    ring.until(lambda: all(stream.tokens or stream.over.is_set() for stream in streams), seconds=60)
    assert [stream for stream in streams if stream.over.is_set()] == []


def drains(ring: Processes) -> bool:
    return bool((ring.state() or {}).get("draining"))


def test_a_stop_lets_answers_end_and_tells_the_others_to_retry(folder: Path, model: Any, tmp_path: Path) -> None:
    short, long = prompt(50, 1), prompt(60, 2)
    with processes(
        2, folder, tmp_path, fresh=True, KVPLANE_RING_DRAIN_SECONDS="6", KVPLANE_RING_HEARTBEAT_LIMIT_SECONDS="60"
    ) as ring:
        ring.formed()
        endless = ring.ask(long, 4000)
        under_way(ring, endless)
        ring.signal(1, signal.SIGSTOP)  # no step ends meanwhile: else the brief one could be over before the stop
        brief = ring.ask(short, 15)
        ring.until(lambda: (ring.state() or {}).get("inFlight") == 2)
        ring.signal(0, signal.SIGTERM)
        ring.until(lambda: drains(ring))
        late = ring.ask(prompt(10, 3), 5)
        assert late.over.wait(30)
        assert (late.error or {}).get("code") == "draining"
        assert not brief.over.is_set()
        ring.signal(1, signal.SIGCONT)
        assert brief.over.wait(60)
        assert (brief.error, brief.broken, brief.finish, len(brief.tokens)) == (None, None, "length", 15)
        assert endless.over.wait(60)
        assert (endless.error or {}).get("code") == "draining"
        assert "retry" in (endless.error or {})["message"]
        assert (endless.broken, endless.finish) == (None, None)
        assert ring.ranks[0].wait(timeout=60) == 0
        assert ring.ranks[1].poll() is None, "it keeps what it holds for the next rank 0"
        ring.signal(1, signal.SIGTERM)
        assert ring.ranks[1].wait(timeout=60) == 0
        assert [rank for rank in range(2) if "Traceback" in ring.log(rank)] == []
    assert wrong(model, short, brief.tokens) == []
    assert wrong(model, long, endless.tokens) == []


def test_a_second_signal_ends_it_at_once(folder: Path, tmp_path: Path) -> None:
    with processes(1, folder, tmp_path, KVPLANE_RING_DRAIN_SECONDS="600") as ring:
        ring.formed()
        endless = ring.ask(prompt(60, 4), 4000)
        under_way(ring, endless)
        ring.signal(0, signal.SIGTERM)
        ring.until(lambda: drains(ring))
        ring.signal(0, signal.SIGTERM)
        assert ring.ranks[0].wait(timeout=30) == -signal.SIGTERM
        assert endless.over.wait(30)
        assert endless.finish is None


def test_a_ring_that_never_formed_stops_too(folder: Path, tmp_path: Path) -> None:
    ring = Processes(3, folder, tmp_path)
    try:
        ring.start(0)
        ring.until(lambda: ring.state() is not None)
        ring.signal(0, signal.SIGTERM)
        assert ring.ranks[0].wait(timeout=60) == 0
    finally:
        ring.close()
