"""A ring that takes a busy rank for lost has not passed the benchmark, however soon its answers came."""

import pytest

from bench.ring.latency import nobody_was_lost


def test_a_rank_that_was_taken_for_lost_ends_the_run() -> None:
    nobody_was_lost({"reforms": {"lost": 0, "left": 0, "joined": 1}})
    with pytest.raises(RuntimeError, match="Busy ranks were taken for lost: 2 re-forms"):
        nobody_was_lost({"reforms": {"lost": 2, "left": 0, "joined": 3}})
