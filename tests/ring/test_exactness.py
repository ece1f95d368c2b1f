"""The ring's logits beside those of the unsharded model, for every architecture: fp32, N = 2, 3 and 4; and in bfloat16."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kvplane_runtime.ring.architectures import UnsupportedArchitectureError, examine
from tests.ring.proved import BOUND, RANKS
from tests.ring.tiny import REFUSED, SERVED, VOCABULARY, Tiny, build, configure
from tests.ring.world import Rings, World


@pytest.fixture(scope="module")
def rings() -> Rings:
    return Rings()


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, dict[int, float]]]:
    """The largest error by architecture and ring size; printed at the end."""
    rows: dict[str, dict[int, float]] = {}
    yield rows
    width = max(map(len, rows), default=0)
    print(f"\n{'architecture':{width}}  N=2      N=3      N=4")
    for name, errors in rows.items():
        print(f"{name:{width}}  " + "  ".join(f"{errors[size]:.1e}" for size in sorted(errors)))


@dataclass(frozen=True)
class Conversation:
    """Two sequences: a long one in two turns, and a short one beside it."""

    long: list[int]
    short: list[int]
    expected_long: Tensor
    expected_short: Tensor


PROMPT, ANSWER, SECOND, AFTER, SHORT = 251, 5, 19, 4, 13
"""Tokens. An answer goes round all ranks and one further."""


def converse(tiny: Tiny, model: torch.nn.Module) -> Conversation:
    draw = random.Random(tiny.name)  # noqa: S311  (tokens, no secrets)
    long = [draw.randrange(3, VOCABULARY) for _ in range(PROMPT + ANSWER + SECOND + AFTER)]
    short = [draw.randrange(3, VOCABULARY) for _ in range(SHORT + ANSWER)]
    with torch.inference_mode():
        return Conversation(long, short, *(model(torch.tensor([tokens])).logits[0].float() for tokens in (long, short)))


class Errors:
    def __init__(self, scale: float) -> None:
        self.worst = 0.0
        self._scale = max(1.0, scale)

    def __call__(self, found: Tensor, expected: Tensor) -> None:
        self.worst = max(self.worst, float((found - expected).abs().max()) / self._scale)
        assert int(found.argmax()) == int(expected.argmax())


def rows(world: World, talk: Conversation) -> Iterator[tuple[Tensor, Tensor]]:
    """Each row of logits that a ring gives in the conversation, with the unsharded model's. A rank is lost in it."""
    size = world.size
    # The first turn in three windows of uneven length, and a short prompt whole on one rank.
    yield world.prompt(1, talk.long[:PROMPT], 0, (101, 2, 148)), talk.expected_long[PROMPT - 1]
    yield world.prompt(2, talk.short[:SHORT], 0, (SHORT,), size - 1), talk.expected_short[SHORT - 1]
    for at in range(ANSWER):
        there, beside = PROMPT + at, SHORT + at
        found = world.decode((1, there, talk.long[there]), (2, beside, talk.short[beside]))
        yield found[0], talk.expected_long[there]
        yield found[1], talk.expected_short[beside]
    # The second turn, few tokens on a long past; then a rank is lost, and its part is computed again.
    second = PROMPT + ANSWER
    yield world.prompt(1, talk.long[second:-AFTER], second, (SECOND,)), talk.expected_long[-AFTER - 1]
    gone = size // 2
    lost = world.layout(1).tokens(gone)
    world.reform([rank for rank in range(size) if rank != gone])
    assert world.refill(1, talk.long, most=90) == lost
    for at in range(len(talk.long) - AFTER, len(talk.long)):
        yield world.decode((1, at, talk.long[at]))[0], talk.expected_long[at]


@pytest.mark.parametrize("tiny", SERVED, ids=lambda tiny: tiny.name)
def test_logits_are_those_of_the_unsharded_model(tiny: Tiny, rings: Rings, table: dict[str, dict[int, float]]) -> None:
    model = build(tiny)
    talk = converse(tiny, model)
    for size in RANKS:
        world = World(rings, model, size)
        errors = Errors(float(talk.expected_long.abs().max()))
        for found, expected in rows(world, talk):
            errors(found, expected)
        world.close()
        table.setdefault(tiny.name, {})[size] = errors.worst
        assert errors.worst <= BOUND


@pytest.mark.parametrize("name", ["llama", "mistral, sliding window"])
def test_in_bfloat16_logits_are_as_near_to_fp32_as_those_of_the_unsharded_model(
    name: str, rings: Rings, tmp_path: Path
) -> None:
    """The same weights in both. Of many rows the unsharded model's worst error is taken, which any row of the ring's may double."""
    tiny = next(tiny for tiny in SERVED if tiny.name == name)
    model = build(tiny)
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    talk = converse(tiny, model)
    model.save_pretrained(tmp_path)

    def loaded() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation=tiny.reference)

    def error(found: Tensor, expected: Tensor) -> float:
        return float((found.float() - expected).abs().max())

    plain = loaded()
    with torch.inference_mode():
        unsharded = max(
            error(plain(torch.tensor([tokens])).logits[0], expected)
            for tokens, expected in ((talk.long, talk.expected_long), (talk.short, talk.expected_short))
        )
    world = World(rings, loaded(), 2)
    assert {each.kv_bytes_per_token for each in world.models} == {3 * 2 * 2 * 16 * 2}
    worst = max(error(found, expected) for found, expected in rows(world, talk))
    world.close()
    print(f"\n{name} in bfloat16: {worst:.3f}, unsharded {unsharded:.3f}")
    assert worst <= 2 * unsharded


@pytest.mark.parametrize(("tiny", "reason"), REFUSED, ids=lambda value: value.name if isinstance(value, Tiny) else "")
def test_what_would_be_wrong_is_refused(tiny: Tiny, reason: str) -> None:
    with pytest.raises(UnsupportedArchitectureError) as refused:
        examine(configure(tiny))
    assert reason in str(refused.value)
    assert f"models of type {tiny.model_type}" in str(refused.value)
