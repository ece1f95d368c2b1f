"""What the answers of ``/health`` mean, in virtual time."""

from kvplane_runtime.sidecar.engine import SILENCE_TOLERANCE_SECONDS, EngineHealth

BEYOND = SILENCE_TOLERANCE_SECONDS + 0.1


def test_before_the_first_answer_the_engine_is_neither_ready_nor_to_be_killed() -> None:
    health = EngineHealth(now=0)
    health.refused()
    assert not health.ready(1)
    assert health.alive(1)
    assert health.dead(1)
    assert health.startup_seconds is None
    assert not health.alive(BEYOND)


def test_the_first_good_answer_makes_it_ready_and_dates_the_startup() -> None:
    health = EngineHealth(now=0)
    health.refused()
    health.answered(42)
    assert health.ready(42)
    assert not health.dead(42)
    assert (health.startup_seconds, health.starts) == (42, 1)
    health.answered(43)
    assert (health.startup_seconds, health.starts) == (42, 1)


def test_a_restarted_sidecar_does_not_take_a_running_engine_for_a_fast_start() -> None:
    health = EngineHealth(now=0)
    health.answered(0.01)
    health.refused()
    health.answered(60)
    assert health.startup_seconds is None


def test_silence_is_tolerated_for_a_while() -> None:
    health = EngineHealth(now=0)
    health.answered(1)
    assert health.ready(1 + SILENCE_TOLERANCE_SECONDS)
    assert not health.ready(1 + BEYOND)
    assert not health.alive(1 + BEYOND)
    assert health.dead(1 + BEYOND)
    health.answered(2 + BEYOND)
    assert health.starts == 1  # it was only busy


def test_an_engine_that_says_it_is_dead_is_not_ready_at_once_and_not_alive_later() -> None:
    health = EngineHealth(now=0)
    health.answered(1)
    health.failed()
    assert not health.ready(1)
    assert health.dead(1)
    assert health.alive(1)
    assert not health.alive(1 + BEYOND)


def test_an_engine_whose_port_was_closed_comes_up_anew() -> None:
    health = EngineHealth(now=0)
    health.answered(1)
    health.refused()
    assert not health.ready(2)
    assert health.dead(2)
    health.answered(3)
    assert health.ready(3)
    assert health.starts == 2


def test_a_rank_that_waits_for_its_ring_is_started_and_alive_and_not_ready() -> None:
    health = EngineHealth(now=0)
    health.refused()
    assert health.loading
    health.waits(20)
    assert not health.loading
    assert not health.ready(20)
    assert not health.dead(20)
    assert (health.starts, health.startup_seconds) == (1, None)
    health.answered(30)
    assert health.ready(30)
    assert (health.starts, health.startup_seconds) == (1, 30)
    for second in range(31, 100):
        health.waits(second)
        assert health.alive(second)
        assert not health.ready(second)
    health.answered(100)
    assert (health.starts, health.ready(100)) == (1, True)


def test_a_rank_that_answers_no_more_is_not_alive_whatever_it_said_before() -> None:
    health = EngineHealth(now=0)
    health.waits(1)
    assert not health.alive(1 + BEYOND)
    health.refused()
    assert health.dead(2)
    health.waits(3)
    assert health.starts == 2
