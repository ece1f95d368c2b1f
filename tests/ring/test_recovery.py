"""Recovery: what is lost is what nobody holds, whatever the members report."""

from hypothesis import given
from hypothesis import strategies as st

from kvplane_runtime.ring.layout import Layout
from kvplane_runtime.ring.messages import Decode, Fork, Positions, Step, Table, Truncate, Window
from kvplane_runtime.ring.ranges import Run, runs
from kvplane_runtime.ring.recovery import Lag, brought, gather, reconcile


def positions(held: tuple[Run, ...]) -> list[int]:
    return [at for run in held for part in run.ranges() for at in range(part.begin, part.end)]


REPORTS = st.lists(
    st.dictionaries(st.integers(0, 2), st.lists(st.integers(0, 40), unique=True), max_size=3), min_size=1, max_size=4
)


@given(lengths=st.dictionaries(st.integers(0, 2), st.integers(1, 30)), reports=REPORTS, data=st.data())
def test_every_position_that_somebody_holds_is_held_once_and_all_others_are_missing(
    lengths: dict[int, int], reports: list[dict[int, list[int]]], data: st.DataObject
) -> None:
    seniority = data.draw(st.permutations(range(len(reports))))
    said = [{sequence: runs(mine) for sequence, mine in report.items()} for report in reports]
    layouts = reconcile(lengths, said, seniority=seniority)
    assert layouts.keys() == lengths.keys()
    for sequence, length in lengths.items():
        layout = layouts[sequence]
        assert layout.length == length
        held = [positions(layout.runs(rank)) for rank in range(len(reports))]
        for rank, mine in enumerate(held):
            reported = reports[rank].get(sequence, [])
            assert mine == [at for at in reported if at in set(mine)], "in the order of its slots"
            for at in mine:
                earlier = seniority[: seniority.index(rank)]
                assert not any(at in reports[other].get(sequence, []) for other in earlier)
        everywhere = {at for report in reports for at in report.get(sequence, []) if at < length}
        assert sorted(at for mine in held for at in mine) == sorted(everywhere)
        assert set(positions(layout.missing())) == set(range(length)) - everywhere


def test_a_rank_behind_is_believed_what_it_held_before_the_steps_it_did_not_finish() -> None:
    now = {0: Layout(2), 1: Layout(2)}
    now[0].append_window(0, 8)
    lag = Lag()
    lag.begin(Step(0, 0, decode=[Decode(0, 8, 1)]), now)
    now[0].append_token(8)
    lag.begin(Step(0, 1, decode=[Decode(0, 9, 1)], window=Window(1, 0, [1] * 4, "zigzag", logits=False)), now)
    now[0].append_token(9)
    now[1].append_window(0, 4)
    assert {s: positions(held) for s, held in lag.report(0, 1, now).items()} == {0: [0, 1, 6, 7, 8], 1: [0, 3]}
    assert {s: positions(held) for s, held in lag.report(1, 0, now).items()} == {0: [2, 3, 4, 5], 1: []}
    assert {s: positions(held) for s, held in lag.report(0, -1, now).items()} == {0: [0, 1, 6, 7], 1: []}
    lag.clear()
    assert positions(lag.report(0, -1, now)[0]) == [0, 1, 6, 7, 8]


def test_what_a_step_cut_off_is_nobodys_even_where_it_was_not_cut_off_yet() -> None:
    layout = Layout(1)
    layout.append_window(0, 10)
    lag = Lag()
    lag.begin(Step(0, 0, truncate=[Truncate(0, 4)], window=Window(0, 4, [9] * 6, "zigzag", logits=False)), {0: layout})
    assert positions(lag.report(0, -1, {0: layout})[0]) == [0, 1, 2, 3]


def test_what_was_cut_and_written_anew_is_not_what_a_rank_behind_holds() -> None:
    """It broke in step 0; the others went on to cut the sequence and to compute other tokens behind the cut."""
    layouts = {0: Layout(2)}
    layouts[0].append_window(0, 20)
    lag = Lag()
    lag.begin(Step(0, 0, decode=[Decode(0, 20, 1)]), layouts)
    layouts[0].append_token(20)
    lag.begin(Step(0, 1, truncate=[Truncate(0, 6)]), layouts)
    layouts[0].truncate(6)
    lag.begin(Step(0, 2, window=Window(0, 6, [9] * 20, "zigzag", logits=False)), layouts)
    layouts[0].append_window(6, 20)
    assert positions(lag.report(0, -1, layouts)[0]) == [0, 1, 2, 3, 4]
    assert positions(lag.report(0, 1, layouts)[0]) == [0, 1, 2, 3, 4]
    assert positions(lag.report(0, 2, layouts)[0]) == [0, 1, 2, 3, 4, *range(6, 11), *range(21, 26)]


def test_what_a_broken_step_may_have_dropped_is_not_claimed() -> None:
    layouts = {0: Layout(1), 1: Layout(1)}
    for layout in layouts.values():
        layout.append_window(0, 10)
    lag = Lag()
    lag.begin(Step(0, 0, release=[0], decode=[Decode(1, 10, 1)]), layouts)
    assert {s: positions(held) for s, held in lag.report(0, -1, layouts).items()} == {0: [], 1: list(range(10))}
    assert positions(lag.report(0, 0, layouts)[0]) == list(range(10))


def test_a_copy_that_a_rank_has_not_made_yet_is_not_there() -> None:
    layouts = {0: Layout(1), 1: Layout(1)}
    for layout in layouts.values():
        layout.append_window(0, 10)
    lag = Lag()
    lag.begin(Step(0, 0, fork=[Fork(0, 1, 10)]), layouts)
    assert 1 not in lag.report(0, -1, layouts)
    assert positions(lag.report(0, 0, layouts)[1]) == list(range(10))


def table(sequence: int, tokens: list[int], held: Run) -> Table:
    return Table.of(sequence, tokens, [[Positions(held.first, held.count, held.step)]])


def test_a_process_that_was_away_keeps_the_kv_of_the_tokens_that_still_are() -> None:
    kept = brought([table(0, [1, 2, 3, 4], Run(1, 2, 2)), table(1, [5], Run(0, 1))], {0: [1, 2, 3, 9, 9]})
    assert {sequence: positions(tuple(held)) for sequence, held in kept.items()} == {0: [1], 1: []}


def test_workers_tell_a_new_rank_0_the_tokens_they_agree_on() -> None:
    run = Run(0, 1)
    tables = [table(0, [1, 2], run), table(0, [1, 2, 3], run), table(1, [4, 5, 6], run), table(1, [4, 7], run)]
    assert {sequence: list(tokens) for sequence, tokens in gather(tables).items()} == {0: [1, 2, 3], 1: [4]}
    assert list(gather([*tables, table(1, [4, 5, 6, 7], run)])[1]) == [4]
