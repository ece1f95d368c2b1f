"""Exactness: the ring's logits beside the unsharded model's, for every architecture that the tests prove.

A conversation of two turns in fp32: prefill in windows of uneven length, a short prompt whole on one rank, decode of both
in one batch, and a second turn. The ranks are threads here, over real sockets: arithmetic does not depend on it.
"""

import math
import random
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from bench.ring.figures import Exactness
from bench.ring.sizes import Size
from e2e.cluster.progress import Progress
from tests.ring.tiny import SERVED, VOCABULARY, Tiny, build
from tests.ring.world import Rings, World

WINDOWS: Final = (101, 2, 148)
PROMPT: Final = sum(WINDOWS)
ANSWER: Final = 9
SECOND: Final = 19
SHORT: Final = 13


def measure(size: Size, progress: Progress) -> Exactness:
    """Every architecture, or the first few of a quick run."""
    rings = Rings()
    chosen = SERVED[: size.architectures]
    found = {}
    for number, tiny in enumerate(chosen, start=1):
        with progress.step(f"exactness {number}/{len(chosen)}: {tiny.name}") as step:
            found[tiny.name] = {str(ranks): worst_error(tiny, rings, ranks) for ranks in size.exact_ranks}
            step.detail = ", ".join(f"N = {ranks}: {error:.1e}" for ranks, error in found[tiny.name].items())
    return Exactness(found, {tiny.name: tiny.model_type for tiny in chosen})


def worst_error(tiny: Tiny, rings: Rings, ranks: int) -> float:
    """Largest error of a logit in the conversation, as a share of the largest logit or of 1."""
    draw = random.Random(tiny.name)
    long = [draw.randrange(3, VOCABULARY) for _ in range(PROMPT + ANSWER + SECOND)]
    short = [draw.randrange(3, VOCABULARY) for _ in range(SHORT + ANSWER)]
    model = build(tiny)
    expected_long, expected_short = _logits(model, long), _logits(model, short)
    pairs: list[tuple[Tensor, Tensor]] = []
    world = World(rings, model, ranks)
    try:
        pairs.append((world.prompt(1, long[:PROMPT], 0, WINDOWS), expected_long[PROMPT - 1]))
        pairs.append((world.prompt(2, short[:SHORT], 0, (SHORT,), ranks - 1), expected_short[SHORT - 1]))
        for at in range(ANSWER):
            there, beside = PROMPT + at, SHORT + at
            rows = world.decode((1, there, long[there]), (2, beside, short[beside]))
            pairs += [(rows[0], expected_long[there]), (rows[1], expected_short[beside])]
        pairs.append((world.prompt(1, long[PROMPT + ANSWER :], PROMPT + ANSWER, (SECOND,)), expected_long[-1]))
    finally:
        world.close()
    scale = max(1.0, float(expected_long.abs().max()), float(expected_short.abs().max()))
    return max(largest_error(found, wanted) for found, wanted in pairs) / scale


def largest_error(found: Tensor, wanted: Tensor) -> float:
    """Of a row of logits; infinite where one is no number, which max() of Python would pass over."""
    return float((found - wanted).abs().nan_to_num(nan=math.inf, posinf=math.inf).max())


def _logits(model: Any, tokens: Sequence[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([list(tokens)])).logits[0].float()
    return logits
