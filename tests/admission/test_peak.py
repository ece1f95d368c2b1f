"""The KV peak of a set of requests."""

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane_runtime.admission.lengths import Curve, draw
from kvplane_runtime.admission.peak import MOMENTS, ONE, Peak, Profile, blocks_held, expected, worst

CERTAIN = draw([(10_000, True)] * 100)
"""Every output runs into its limit."""


def profile(
    prompt: int, limit: int | None, *, generated: int = 0, outputs: int = 1, curve: Curve = CERTAIN, block_size: int = 1
) -> Profile:
    return expected(
        curve=curve,
        prompt=prompt,
        generated=generated,
        limit=limit,
        outputs=outputs,
        block_size=block_size,
        shared=True,
    )


def past_future(requests: list[tuple[int, int]]) -> float:
    """The peak of (held now, tokens to come) requests as the paper computes it, eq. 3 of arXiv 2507.10150."""
    ordered = sorted(requests, key=lambda request: -request[1])
    held, peak = 0, 0
    for place, (now, left) in enumerate(ordered, start=1):
        held += now
        peak = max(peak, held + left * place)
    return peak


@given(st.lists(st.tuples(st.integers(1, 500), st.sampled_from(MOMENTS[1:30])), min_size=1, max_size=20))
def test_with_known_lengths_it_is_the_past_future_peak(requests: list[tuple[int, int]]) -> None:
    peak = Peak()
    for prompt, left in requests:
        peak.add(profile(prompt, left))
    assert peak.blocks(z=1.0) == pytest.approx(past_future(requests), rel=0.01)


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(1, 900)), min_size=1, max_size=20))
def test_between_the_moments_it_is_never_too_low_and_little_too_high(requests: list[tuple[int, int]]) -> None:
    peak = Peak()
    for prompt, left in requests:
        peak.add(profile(prompt, left))
    true = past_future(requests)
    assert true * 0.999 <= peak.blocks(z=0.0) <= true * 1.26 + 4 * len(requests)


def test_random_lengths_are_weighed_by_their_chance() -> None:
    """Outputs that end at 10 or go on to 1,000: simulated, the sum stays below the peak in about the share that z says."""
    curve = draw([(10, False)] * 90 + [(1000, True)] * 10)
    requests = 60
    peak = Peak()
    for _ in range(requests):
        peak.add(profile(100, 1000, curve=curve))
    draws = random.Random(3)  # noqa: S311
    highest = []
    for _ in range(300):
        lengths = [10 if draws.random() < 0.89 else 1000 for _ in range(requests)]
        highest.append(past_future([(100, length) for length in lengths]))
    assert peak.blocks(z=0.0) < 0.5 * past_future([(100, 1000)] * requests)
    above = sum(true > peak.blocks(z=1.0) for true in highest) / len(highest)
    assert above < 0.3


def test_the_margin_grows_with_the_root_of_the_number() -> None:
    curve = draw([(length, False) for length in range(1, 400)])
    margins = []
    for requests in (10, 250):
        peak = Peak()
        for _ in range(requests):
            peak.add(profile(100, None, curve=curve))
        margins.append(peak.blocks(z=1.0) / peak.blocks(z=0.0) - 1)
    assert margins[0] > 3 * margins[1]


@given(
    st.lists(
        st.tuples(st.integers(1, 500), st.none() | st.integers(1, 900), st.integers(1, 5), st.integers(0, 300)),
        max_size=12,
    ),
    st.randoms(use_true_random=False),
)
def test_nothing_is_left_when_all_are_gone(
    requests: list[tuple[int, int | None, int, int]], order: random.Random
) -> None:
    curve = draw([(length, False) for length in range(1, 90)])
    profiles = [
        profile(prompt, limit, outputs=outputs, generated=min(generated, limit or generated), curve=curve)
        for prompt, limit, outputs, generated in requests
    ]
    peak = Peak()
    for one in profiles:
        peak.add(one)
    order.shuffle(profiles)
    for one in profiles:
        peak.remove(one)
    assert peak.blocks(z=1.0) == 0


def test_a_candidate_is_counted_as_if_it_were_in() -> None:
    peak, both = Peak(), Peak()
    first, second = profile(100, 50), profile(30, 400)
    peak.add(first)
    both.add(first)
    both.add(second)
    assert peak.blocks(second, z=1.0) == both.blocks(z=1.0)


def test_outputs_share_whole_prompt_blocks() -> None:
    held = {"prompt": 100, "generated": 10, "block_size": 16}
    assert blocks_held(outputs=1, shared=True, **held) == 7
    assert blocks_held(outputs=4, shared=True, **held) == 6 + 4  # 4 + 10 tokens of each are their own
    assert blocks_held(outputs=4, shared=False, **held) == 28
    shared = profile(1600, 1, outputs=4, block_size=16).mean[0]
    assert shared < 1.1 * profile(1600, 1, block_size=16).mean[0]


def test_worst_is_all_that_may_come() -> None:
    reserved = worst(prompt=100, limit=60, outputs=2, lookahead=5, block_size=16)
    assert reserved.mean == (2 * 11 * ONE,)
    assert reserved.variance == (0,)


def test_when_room_comes_free() -> None:
    peak = Peak()
    peak.add(profile(500, 64))
    peak.add(profile(300, 400))
    own = profile(200, 10)
    # The first ends 64 steps from now, between the moments 62 and 77; until 400 the second grows to 700.
    assert peak.steps_until(own, limit=2000, z=0.0) == 0
    assert peak.steps_until(own, limit=950, z=0.0) == 96
    assert peak.steps_until(own, limit=100, z=0.0) is None


def test_moments_reach_far_enough_and_grow_by_a_quarter() -> None:
    assert MOMENTS[0] == 0
    assert MOMENTS[-1] >= 250_000
    assert all(b <= max(a + 4, math.ceil(a * 1.25)) for a, b in pairwise(MOMENTS))
