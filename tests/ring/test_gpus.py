"""A ring of GPUs: NCCL between real processes, one for each GPU, and a rank that is lost. `make test-gpu` only."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.ring.processes import Processes, Stream
from tests.ring.tiny import VOCABULARY, Tiny, build, wrong

pytestmark = [pytest.mark.gpu, pytest.mark.several_gpus]
MODELS = (Tiny("llama", "llama"), Tiny("mistral", "mistral", {"sliding_window": 40}))
MOST = 4
COUNT = 120


@dataclass(frozen=True)
class Served:
    """A ring, and the same model here."""

    ring: Processes
    model: Any

    def ask(self, tokens: list[int]) -> Stream:
        return self.ring.ask(tokens, COUNT)

    def check(self, stream: Stream, tokens: list[int]) -> None:
        """The answer came to its end, and is what the unsharded model says on the CPU."""
        assert stream.over.wait(120)
        assert (stream.error, stream.broken) == (None, None)
        assert len(stream.tokens) == COUNT
        assert wrong(self.model, tokens, stream.tokens) == []


@pytest.fixture(scope="module", params=MODELS, ids=lambda tiny: tiny.name)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    gpus = torch.cuda.device_count()
    assert gpus >= 2, f"NCCL takes one rank for each GPU, and this machine has {gpus}; ONE=1 leaves these tests out."
    folder = tmp_path_factory.mktemp(request.param.name)
    model = build(request.param)
    model.save_pretrained(folder)
    logs = tmp_path_factory.mktemp("logs")
    ring = Processes(min(gpus, MOST), folder, logs, fresh=True, KVPLANE_RING_DEVICE="cuda")
    try:
        start(ring, *range(ring.size))
        ring.formed()
        yield Served(ring, model)
    finally:
        ring.close()


def start(ring: Processes, *ranks: int) -> None:
    """Each with the GPU that bears its number."""
    for rank in ranks:
        ring.start(rank, CUDA_VISIBLE_DEVICES=str(rank))


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_long_and_short_prompts_and_a_second_turn(served: Served) -> None:
    asked = [prompt(length, length) for length in (1500, 7, 400)]
    streams = [served.ask(tokens) for tokens in asked]
    for stream, tokens in zip(streams, asked, strict=True):
        served.check(stream, tokens)
    again = [*asked[0], *streams[0].tokens, *prompt(20, 3)]
    stream = served.ask(again)
    served.check(stream, again)
    assert stream.usage["prompt_tokens_details"]["cached_tokens"] >= 1500


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_is_lost_in_generation(served: Served, number: signal.Signals) -> None:
    """The others are woken out of kernels that wait for it, and go on with their KV where they are enough for a ring."""
    ring, last = served.ring, served.ring.size - 1
    tokens = prompt(500, int(number))
    stream = served.ask(tokens)
    ring.until(lambda: len(stream.tokens) >= 10 or stream.over.is_set(), seconds=60)
    assert not stream.over.is_set(), (stream.error, stream.broken)
    ring.signal(last, number)
    ring.formed(*range(last))
    if number == signal.SIGKILL:
        start(ring, last)
    else:
        ring.signal(last, signal.SIGCONT)
    served.check(stream, tokens)
    ring.formed()
