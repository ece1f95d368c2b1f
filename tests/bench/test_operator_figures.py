"""How the operator's benchmark sums up what it measured."""

from collections import Counter

import pytest

from bench import report
from bench.operator.__main__ import Outcome, Size, figures, rows, summary
from bench.operator.measures import Burst, Idle, Recovery, Timing
from bench.operator.requests import Requests

LAST_LINE = [
    "create_median_ms",
    "create_p99_ms",
    "burst200_s",
    "burst1000_s",
    "update_median_ms",
    "idle_rps_0",
    "idle_rps_1000",
    "rss_mb_1000",
    "converge_after_kill_s",
    "peer",
    "peer_create_median_ms",
    "peer_burst200_s",
    "peer_idle_rps",
    "peer_rss_mb",
]


def _timing(milliseconds: float) -> Timing:
    return Timing(since_sent=milliseconds / 1000, since_answered=milliseconds / 1000 - 0.004)


def _burst(count: int, seconds: float) -> Burst:
    return Burst(count=count, seconds=seconds, complete_seconds=seconds + 0.1, timings=(_timing(1000 * seconds),))


def _idle(objects: int, requests: int, rss_mb: float) -> Idle:
    return Idle(
        objects=objects,
        seconds=100.0,
        requests=Requests(Counter({("PUT", "leases"): requests})),
        noise_per_second=0.1,
        rss_mb=rss_mb,
        cpu_percent=0.5,
    )


def _outcome(name: str) -> Outcome:
    return Outcome(
        name=name,
        creations=((_timing(10), _timing(10), _timing(90)), (_timing(12),), (_timing(14),)),
        small=(_burst(200, 4.0), _burst(200, 9.0), _burst(200, 5.0)),
        large=_burst(1000, 20.0),
        updates=(_timing(11),),
        idle=(_idle(0, 50, 70.0), _idle(200, 50, 90.0), _idle(1000, 60, 120.0)),
        recoveries=(Recovery(seconds=16.0, leading_seconds=13.5, doubled=0),),
    )


def test_the_last_line_has_the_figures_that_scripts_expect_in_their_order() -> None:
    line = summary(_outcome("kvplane"), _outcome("peer-v1"))
    assert list(line) == LAST_LINE
    assert line["create_median_ms"] == pytest.approx(12.0)  # the median of the runs' medians
    assert line["create_p99_ms"] == pytest.approx(90.0)  # of all samples
    assert line["burst200_s"] == 5.0
    assert line["idle_rps_0"] == pytest.approx(0.4)
    assert line["idle_rps_1000"] == pytest.approx(0.1)  # the difference
    assert line["peer"] == "peer-v1"


def test_a_single_controller_has_no_peer_in_its_last_line() -> None:
    assert list(summary(_outcome("kvplane"), None)) == LAST_LINE[: LAST_LINE.index("peer")]


def test_lease_and_work_after_a_kill_are_told_apart() -> None:
    assert _outcome("x").recoveries[0].working_seconds() == pytest.approx(2.5)


def test_every_outcome_has_the_same_rows() -> None:
    labels = [[label for label, _ in rows(_outcome(name), Size())] for name in ("kvplane", "peer")]
    assert labels[0] == labels[1]
    assert report.table(("", "a"), rows(_outcome("kvplane"), Size()))


def test_objects_per_second() -> None:
    assert _outcome("x").small[0].per_second() == 50.0
    assert figures(_outcome("x")).burst_large_s == 20.0
