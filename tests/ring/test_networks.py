"""The same logits over a network that carries out one operation at a time, and over one that is slow for one rank."""

import random
import time
from typing import Any

import pytest
import torch

from kvplane_runtime.ring import attention
from tests.ring.networks import Formed, InOrder, Late
from tests.ring.tiny import VOCABULARY, Tiny, build
from tests.ring.world import World

LLAMA = Tiny("llama", "llama")
SLIDING = Tiny("mistral", "mistral", {"sliding_window": 40})
DRAW = random.Random(6)  # noqa: S311  (tokens, no secrets)
LONG = [DRAW.randrange(3, VOCABULARY) for _ in range(230)]
SHORT = [DRAW.randrange(3, VOCABULARY) for _ in range(20)]


def logits(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(torch.tensor([tokens])).logits[0].float()
    return found


def talk(tiny: Tiny, rings: Formed, size: int) -> None:
    """A conversation and a loss; every row of logits is the unsharded model's."""
    model = build(tiny)
    long, short = logits(model, LONG), logits(model, SHORT)
    bound = 5e-5 * max(1.0, float(long.abs().max()))
    world = World(rings, model, size)  # type: ignore[arg-type]

    def check(found: torch.Tensor, wanted: torch.Tensor) -> None:
        assert float((found - wanted).abs().max()) < bound

    check(world.prompt(1, LONG[:200], 0, (101, 2, 97)), long[199])
    check(world.prompt(2, SHORT[:15], 0, (15,), size - 1), short[14])
    for at in range(5):
        rows = world.decode((1, 200 + at, LONG[200 + at]), (2, 15 + at, SHORT[15 + at]))
        check(rows[0], long[200 + at])
        check(rows[1], short[15 + at])
    check(world.prompt(1, LONG[205:220], 205, (15,)), long[219])
    lost = world.layout(1).tokens(1)
    world.reform([rank for rank in range(size) if rank != 1])
    assert world.refill(1, LONG, most=60) == lost
    for at in range(220, 225):
        check(world.decode((1, at, LONG[at]))[0], long[at])
    world.close()


@pytest.mark.parametrize("way", ["keys", "queries"])
@pytest.mark.parametrize("tiny", [LLAMA, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("size", [2, 4])
def test_no_operation_waits_for_one_that_its_rank_posts_later(
    size: int, tiny: Tiny, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "choose", lambda **_: way)
    talk(tiny, Formed(InOrder), size)


@pytest.mark.parametrize("way", ["keys", "queries"])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_with_a_slow_network_makes_all_slower_and_nothing_else(
    rank: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "choose", lambda **_: way)
    talk(LLAMA, Formed(lambda ring: Late(ring, rank=rank, seconds=0.02)), 3)


def test_a_prompt_may_take_its_rank_longer_than_a_peer_may_be_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies whole on that rank, which computes it alone; rank 0 waits for its logits meanwhile."""
    # Only rank 0 has a short limit: a busy machine may take longer than it even to send the logits.
    rings = Formed(lambda ring: ring, quiet_seconds=lambda rank: 20.0 if rank else 0.3)
    world = World(rings, build(LLAMA), 2)  # type: ignore[arg-type]
    forward = world.models[1]._forward

    def slow(*given: Any, **named: Any) -> torch.Tensor:
        time.sleep(1.0)
        return forward(*given, **named)

    monkeypatch.setattr(world.models[1], "_forward", slow)
    found = world.prompt(1, SHORT, 0, (len(SHORT),), 1)
    expected = logits(build(LLAMA), SHORT)[-1]
    assert float((found - expected).abs().max()) < 5e-5 * max(1.0, float(expected.abs().max()))
    world.close()
