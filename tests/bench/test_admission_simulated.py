"""The benchmark's cells in virtual time: what is promised, and a run."""

import pytest

from bench.admission.arena import PACE
from bench.admission.plan import Size
from bench.admission.replay.contestants import NONE, OURS
from bench.admission.simulated import Key, run, unloaded


def test_what_is_promised_follows_from_the_pace() -> None:
    promised = unloaded("chat", Size())
    assert promised.tpot_seconds == pytest.approx(2 * (PACE.base + PACE.per_decode))
    assert promised.ttft_seconds > 5 * PACE.base


@pytest.mark.parametrize("family", [NONE, OURS])
def test_an_engine_with_little_to_do_serves_all_in_time(family: str) -> None:
    result = run(Key(family, 0, "chat", 1.0, seed=1), {"chat": 1.0}, unloaded("chat", Size()), Size())
    assert (result.goodput, result.refused, result.recomputed_tokens) == (1.0, 0.0, 0)
    assert result.computed_tokens > 0
