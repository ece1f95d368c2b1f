"""Greedy exactness, cuts, and draws that depend on nothing but seed, output and index."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kvplane_runtime.ring.sampling import Draw, Logits, NotFiniteError, Sampled, Sampling, sample

ROWS = arrays.arrays(np.float32, (1, 40), elements=st.floats(-20, 20, width=32))
COARSE = arrays.arrays(np.float32, (1, 40), elements=st.integers(-3, 3).map(np.float32))
"""With many equals."""


def draw(sampling: Sampling, *, row: int = 0, output: int = 0, index: int = 0) -> Draw:
    return Draw(row, sequence=1, sampling=sampling, output=output, index=index)


def one(logits: Logits, sampling: Sampling, *, output: int = 0, index: int = 0) -> Sampled:
    return sample(logits, draw(sampling, output=output, index=index))


@given(COARSE)
def test_greedy_takes_the_highest_and_of_equals_the_lowest_id(logits: Logits) -> None:
    best = [i for i, value in enumerate(logits[0]) if value == logits[0].max()]
    assert one(logits, Sampling(temperature=0)).token == best[0]


@given(COARSE, st.integers(1, 40), st.integers(0, 5))
def test_top_k_leaves_the_likeliest_and_of_equals_the_lowest_ids(logits: Logits, k: int, index: int) -> None:
    allowed = sorted(range(40), key=lambda i: (-logits[0, i], i))[:k]
    assert one(logits, Sampling(top_k=k), index=index).token in allowed


@given(ROWS, st.floats(0.05, 0.99), st.integers(0, 5))
def test_top_p_leaves_the_smallest_set_that_sums_to_p(logits: Logits, p: float, index: int) -> None:
    odds = np.exp(logits[0].astype(float) - logits[0].max())
    odds /= odds.sum()
    order = sorted(range(40), key=lambda i: (-logits[0, i], i))
    needed = 1 + sum(odds[order[: n + 1]].sum() < p - 1e-9 for n in range(39))
    assert one(logits, Sampling(top_p=p), index=index).token in order[:needed]


@given(ROWS, st.integers(-(2**63), 2**63 - 1), st.integers(0, 63), st.integers(0, 10**7))
def test_a_draw_is_the_same_whatever_else_is_in_the_batch(logits: Logits, seed: int, output: int, index: int) -> None:
    sampling = Sampling(seed=seed, temperature=0.8, top_p=0.9)
    alone = sample(logits, draw(sampling, output=output, index=index))
    beside = np.concatenate((logits[:, ::-1], logits))
    assert sample(beside, draw(sampling, row=1, output=output, index=index)) == alone


def test_outputs_and_tokens_have_random_numbers_of_their_own() -> None:
    logits = np.zeros((1, 1000), dtype=np.float32)
    tokens = {
        one(logits, Sampling(seed=1), output=output, index=index).token for output in range(4) for index in range(4)
    }
    assert len(tokens) > 12


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.2]], dtype=np.float32))
    tokens = [one(logits, Sampling(seed=3), index=index).token for index in range(4000)]
    shares = [tokens.count(token) / 4000 for token in range(3)]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


def test_a_low_temperature_sharpens() -> None:
    logits = np.array([[1.0, 1.1]], dtype=np.float32)
    assert {one(logits, Sampling(temperature=0.001), index=index).token for index in range(50)} == {1}


@given(ROWS)
def test_log_probabilities_are_those_of_the_model(logits: Logits) -> None:
    sampled = one(logits, Sampling(temperature=0.3, top_k=2, logprobs=3))
    exact = logits[0].astype(float) - np.log(np.exp(logits[0].astype(float)).sum())
    assert sampled.logprob == pytest.approx(exact[sampled.token], abs=1e-5)
    assert [token for token, _ in sampled.top] == sorted(range(40), key=lambda i: (-logits[0, i], i))[:3]
    assert [value for _, value in sampled.top] == pytest.approx(sorted(exact, reverse=True)[:3], abs=1e-5)


def test_no_alternatives_are_told_unless_asked_for() -> None:
    logits = np.zeros((1, 4), dtype=np.float32)
    assert one(logits, Sampling(temperature=0)) == Sampled(0)
    assert one(logits, Sampling(temperature=0, logprobs=0)) == Sampled(0, pytest.approx(-np.log(4)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_token_is_chosen_from_nonsense(value: float) -> None:
    logits = np.zeros((1, 8), dtype=np.float32)
    logits[0, 5] = value
    with pytest.raises(NotFiniteError, match="sequence 1"):
        one(logits, Sampling())


def test_masked_tokens_are_never_drawn() -> None:
    logits = np.full((1, 8), -np.inf, dtype=np.float32)
    logits[0, 6] = 0
    assert one(logits, Sampling(logprobs=1)).token == 6
