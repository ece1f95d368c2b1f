"""The simulated engine repeats what a real one decided, step by step; recordings are read, timed and compared rightly."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench.engine.schedule import Added, Recording, Step, differences, parse, renumbered

SCHEDULES = Path(__file__).parent / "schedules"
RECORDINGS = {path.stem: Recording.read(path) for path in sorted(SCHEDULES.glob("*.json"))}


@pytest.mark.parametrize("name", RECORDINGS)
def test_every_decision_of_the_real_engine_is_repeated(name: str) -> None:
    assert differences(RECORDINGS[name]) == []


def test_the_recordings_hold_what_they_are_there_for() -> None:
    assert set(RECORDINGS) == {"small-budget", "usual"}
    for recording in RECORDINGS.values():
        steps = recording.steps
        assert sum(len(step.preempted) for step in steps) >= 5
        assert any(step.waiting for step in steps)
        first_runs = {number: before for step in reversed(steps) for number, before, _ in step.scheduled}
        assert sum(before > 0 for before in first_runs.values()) >= 5, "prefixes found"
    budget = RECORDINGS["small-budget"].config.max_num_batched_tokens
    cut = [step for step in RECORDINGS["small-budget"].steps if sum(new for _, _, new in step.scheduled) == budget]
    assert len(cut) >= 20, "prompts in chunks"


def test_a_different_decision_is_found_and_told() -> None:
    recording = RECORDINGS["usual"]
    index = next(i for i, step in enumerate(recording.steps) if step.preempted)
    steps = list(recording.steps)
    steps[index] = replace(steps[index], preempted=())
    (told,) = differences(replace(recording, steps=tuple(steps)))
    assert told.startswith(f"step {index}: preempted was [], simulated [")
    steps = list(recording.steps)
    steps[3] = replace(steps[3], free=steps[3].free - 1)
    (told,) = differences(replace(recording, steps=tuple(steps)))
    assert told.startswith("step 3: free was")


def test_a_step_of_the_real_engine_where_the_simulated_one_is_idle_is_found() -> None:
    recording = RECORDINGS["usual"]
    idle = replace(recording, steps=(replace(recording.steps[0], added=()),))
    assert differences(idle) == ["step 0: the real engine ran 1 requests, the simulated one is idle"]


def test_a_recording_is_written_as_it_is_read(tmp_path: Path) -> None:
    recording = RECORDINGS["usual"]
    recording.write(tmp_path / "again.json", note="again")
    assert Recording.read(tmp_path / "again.json") == recording


LINES = [
    '{"at":1.0,"decided":1.001,"added":[{"id":"a","prompt":40,"max":3,"hashes":[0]}],"aborted":[],'
    '"scheduled":{"a":[0,40]},"preempted":[],"running":1,"waiting":0,"free":94}\n',
    '{"completed":1.5,"left":1}\n',
    '{"at":1.6,"decided":1.601,"added":[{"id":"b","prompt":5,"max":1,"hashes":[]}],"aborted":[],'
    '"scheduled":{"a":[40,1],"b":[0,5]},"preempted":[],"running":2,"waiting":0,"free":93}\n',
    '{"completed":1.7,"left":0}\n',
    '{"at":9.0,"decided":9.001,"added":[],"aborted":["a"],"scheduled":{},"preempted":[],"running":0,"waiting":0,"free":96}\n',
]


def test_a_step_lasts_until_the_next_one_unless_the_engine_was_idle_in_between() -> None:
    first, second, third = parse(LINES)
    assert first.seconds == pytest.approx(0.6)
    assert second.seconds == pytest.approx(0.1)
    assert third.seconds is None
    assert first.added == (Added(40, 3, (0,)),)
    assert (first.prefill_tokens, first.decodes, first.context_tokens) == (40, 0, 0)
    assert (second.prefill_tokens, second.decodes, second.context_tokens) == (5, 1, 40)
    assert second.scheduled == ((0, 40, 1), (1, 0, 5))
    assert third.aborted == (0,)


def test_a_line_that_was_cut_off_is_left_out() -> None:
    assert len(parse([*LINES[:2], LINES[2][:50]])) == 1


def test_a_part_is_counted_from_its_own_first_request() -> None:
    step = Step(
        added=(Added(5, 1, ()),), aborted=(8,), scheduled=((7, 0, 5), (9, 3, 1)), preempted=(9,),
        running=2, waiting=0, free=90,
    )  # fmt: skip
    (moved,) = renumbered([step])
    assert (moved.scheduled, moved.aborted, moved.preempted) == (((0, 0, 5), (2, 3, 1)), (1,), (2,))
