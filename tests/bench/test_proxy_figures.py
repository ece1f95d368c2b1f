"""The proxy benchmark's arithmetic, and the line that scripts read."""

import math
from dataclasses import replace

from bench import report
from bench.proxy.figures import HEADER, Level, Load, Round, Spread, added_p99_ms, cpu_us, request_rows, rows, summary


def load(p99_ms: float, cpu_seconds: float) -> Load:
    spread = Spread(count=100, median_ms=p99_ms / 2, p99_ms=p99_ms, max_ms=2 * p99_ms)
    return Load(
        cpu_seconds=cpu_seconds,
        seconds=10,
        requests=1_000,
        chunks=100_000,
        first_byte=replace(spread, p99_ms=2 * p99_ms),
        chunk=spread,
    )


ROUNDS = [
    Round(direct=load(1.0, 1.0), ours=load(1.4, 1.6), peer=load(1.5, 2.0), alone=load(1.3, 1.2)),
    Round(
        direct=load(5.0, 1.0), ours=load(5.1, 1.6), peer=load(5.6, 2.0), alone=load(5.1, 1.2)
    ),  # a slow minute for all
    Round(direct=load(1.0, 1.0), ours=load(1.2, 1.6), peer=load(1.4, 2.0), alone=load(1.1, 1.2)),
]
LEVELS = [Level(1, ROUNDS[:1]), Level(500, ROUNDS), Level(1000, ROUNDS[:1])]


def test_what_is_added_is_told_from_the_direct_run_of_the_same_round() -> None:
    first_byte, chunk = added_p99_ms(LEVELS[1], lambda one: one.ours)
    assert math.isclose(chunk, 0.2)
    assert math.isclose(first_byte, 0.4)
    assert math.isclose(added_p99_ms(LEVELS[1], lambda one: one.peer)[1], 0.5)


def test_cpu_time_is_shared_out_to_chunks_or_requests() -> None:
    loads = [one.ours for one in ROUNDS]
    assert math.isclose(cpu_us(loads), 16)
    assert math.isclose(cpu_us(loads, per_request=True), 1600)


def test_too_little_cpu_time_is_no_figure() -> None:
    assert math.isnan(cpu_us([load(1.0, 0.05)]))


def test_the_last_line_is_of_the_judged_level_and_of_the_sidecar() -> None:
    line = report.last_line("proxy", summary(LEVELS, Level(16, ROUNDS), judged=500))
    assert line == (
        "bench proxy: ttfb_added_p99_ms=0.40 chunk_added_p99_ms=0.20 cpu_per_chunk_vs_go=0.80 "
        "cpu_per_request_vs_go=0.80 streams=500"
    )


def test_every_line_of_the_table_has_every_column() -> None:
    lines = rows(LEVELS) + request_rows(Level(16, ROUNDS))
    assert len(lines) == 16
    assert {len(line) for line in lines} == {len(HEADER)}


def test_what_deciding_costs_is_read_off_two_lines_of_the_table() -> None:
    cpu = {line[0].partition(", ")[2]: line[-1] for line in rows([Level(500, ROUNDS)])}
    assert cpu == {"direct": "", "kvplane": "16.0", "its proxy without admission": "12.0", "ReverseProxy": "20.0"}
