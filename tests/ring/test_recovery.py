"""Recovery: what is lost is what nobody holds, whatever the members report."""

from hypothesis import given
from hypothesis import strategies as st

from kvplane_runtime.ring.layout import Layout
from kvplane_runtime.ring.messages import Decode, Fork, Positions, Step, Table, Truncate, Window
from kvplane_runtime.ring.ranges import Run, runs
from kvplane_runtime.ring.recovery import Lag, Need, brought, gather, park, reconcile


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


def test_a_copy_that_a_rank_has_not_made_yet_is_not_there() -> None:
    layouts = {0: Layout(1), 1: Layout(1)}
    for layout in layouts.values():
        layout.append_window(0, 10)
    lag = Lag()
    lag.begin(Step(0, 0, fork=[Fork(0, 1, 10)]), layouts)
    assert 1 not in lag.report(0, -1, layouts)
    assert positions(lag.report(0, 0, layouts)[1]) == list(range(10))


def table(sequence: int, tokens: list[int], held: Run) -> Table:
    return Table(sequence, tokens, [[Positions(held.first, held.count, held.step)]])


def test_a_process_that_was_away_keeps_the_kv_of_the_tokens_that_still_are() -> None:
    kept = brought([table(0, [1, 2, 3, 4], Run(1, 2, 2)), table(1, [5], Run(0, 1))], {0: [1, 2, 3, 9, 9]})
    assert {sequence: positions(tuple(held)) for sequence, held in kept.items()} == {0: [1], 1: []}


def test_workers_tell_a_new_rank_0_the_tokens_they_agree_on() -> None:
    run = Run(0, 1)
    tables = [table(0, [1, 2], run), table(0, [1, 2, 3], run), table(1, [4, 5, 6], run), table(1, [4, 7], run)]
    assert gather(tables) == {0: [1, 2, 3], 1: [4]}
    assert gather([*tables, table(1, [4, 5, 6, 7], run)])[1] == [4]


def test_who_has_most_slack_is_parked_and_a_smaller_one_goes_on() -> None:
    needs = [
        Need(0, held=(40, 40), missing=20, coming=(5, 5)),
        Need(1, held=(20, 20), missing=40, coming=(5, 5)),
        Need(2, held=(1, 1), missing=2, coming=(1, 1)),
    ]
    assert park(needs, capacity=1000) == ()
    assert park(needs, capacity=80) == (1,)
    assert park([], capacity=1) == ()
