"""What the ring benchmark asks beside a long prefill; and that a ring that takes a busy rank for lost has not passed."""

import pytest

from bench.ring.latency import LONG_SEEDS, SHORT_TOKENS, nobody_was_lost
from bench.ring.ranks import prompt


def test_a_rank_that_was_taken_for_lost_ends_the_run() -> None:
    nobody_was_lost({"reforms": {"lost": 0, "left": 0, "joined": 1}})
    with pytest.raises(RuntimeError, match="Busy ranks were taken for lost: 2 re-forms"):
        nobody_was_lost({"reforms": {"lost": 2, "left": 0, "joined": 3}})


def test_no_short_prompt_is_the_beginning_of_a_long_one() -> None:
    """Else it would find its prefix computed."""
    short = [prompt(SHORT_TOKENS, vocabulary=512, seed=seed) for seed in range(200)]
    for number in range(4):
        assert prompt(SHORT_TOKENS, vocabulary=512, seed=LONG_SEEDS + number) not in short
