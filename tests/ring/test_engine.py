"""The engine with a model that is none, over real control connections: whatever fails, the tokens are the right ones."""

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue
from unittest import mock

import pytest

from kvplane_runtime.ring import messages
from kvplane_runtime.ring.admission import Refusal
from kvplane_runtime.ring.communicator import PATIENT_SECONDS
from kvplane_runtime.ring.control import Gone
from kvplane_runtime.ring.engine import About, Leader, Promise, RingEngine, Shutdown
from kvplane_runtime.ring.membership import BUILT, Fence, Formed, Limits
from kvplane_runtime.ring.requests import Policy
from tests.ring.crew import LIMIT_SECONDS, Answer, Crew, LeaderProcess, Process, WorkerProcess, answer


@contextlib.contextmanager
def started() -> Iterator[Crew]:
    made = Crew(4)
    yield made
    made.close()
    assert [each.ended for each in (made.leader, *made.workers.values()) if each.ended] == []


@pytest.fixture
def crew() -> Iterator[Crew]:
    with started() as made:
        yield made


@pytest.fixture(scope="module")
def calm() -> Iterator[Crew]:
    """One for all tests that leave their ring as it is."""
    with started() as made:
        yield made


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(seed * 7919 + at * at) % 900 for at in range(length)]


def test_a_ring_serves(calm: Crew) -> None:
    calm.formed(0, 1, 2, 3)
    long, short = calm.ask(prompt(300), 12), calm.ask(prompt(20, 1), 30)
    assert long.over.wait(20)
    assert short.over.wait(20)
    assert long.tokens == answer(prompt(300), 12)
    assert short.tokens == answer(prompt(20, 1), 30)


def in_step(crew: Crew, ordinal: int, when: str, *, batch: int = 1) -> threading.Event:
    """Set when the rank begins its next step of a kind (``window`` or ``decode``), in which it then hangs until killed."""
    reached = threading.Event()

    def hook(process: Process, step: messages.Step) -> None:
        if process.ordinal == ordinal and (step.window if when == "window" else len(step.decode) >= batch):
            crew.hooks.remove(hook)
            reached.set()
            process.killed.wait(20)

    crew.hooks.append(hook)
    return reached


@pytest.mark.parametrize("ordinal", [1, 3])
@pytest.mark.parametrize("when", ["window", "decode"])
def test_a_rank_killed_in_the_midst_of_a_step_changes_no_token(crew: Crew, ordinal: int, when: str) -> None:
    crew.formed(0, 1, 2, 3)
    victim = crew.workers[ordinal]
    reached = in_step(crew, ordinal, when)
    got = [crew.ask(prompt(200, seed), 40) for seed in range(3)]
    assert reached.wait(20)
    if when == "decode":  # who is still in the step before would lose its part of that, too
        crew.until(lambda: all(each.step == victim.step for each in (crew.leader, *crew.workers.values())))
    victim.kill()
    for seed, each in enumerate(got):
        assert each.over.wait(20)
        assert each.tokens == answer(prompt(200, seed), 40)
    state = crew.leader.leader.state
    assert state.members == tuple(rank for rank in range(4) if rank != ordinal)
    assert state.reforms["lost"] == 1
    if when == "decode":
        assert state.scheduler.counts["refilled_tokens"] == 200 // 4  # only the first to decode was placed yet


def test_a_ring_that_breaks_after_a_long_time_fails_no_request(crew: Crew) -> None:
    """How long there was no ring is counted from the break."""
    crew.formed(0, 1, 2, 3)
    reached = in_step(crew, 1, "decode")
    got = crew.ask(prompt(200), 20)
    assert reached.wait(20)
    crew.later = 1000.0
    crew.workers[1].kill()
    assert got.over.wait(20)
    assert got.tokens == answer(prompt(200), 20)


def test_a_rank_that_lives_and_never_ends_a_step_in_which_nobody_needs_it_is_left_out() -> None:
    """No exchange waits for it: only rank 0, before it plans the next step."""
    crew = Crew(4, limits=Limits(heartbeat=LIMIT_SECONDS, stop=1.0, form=5.0, gather=5.0))
    try:
        crew.formed(0, 1, 2, 3)
        reached = in_step(crew, 1, "window")
        got = crew.ask(prompt(60), 12)  # in several windows on rank 0
        assert reached.wait(20)
        crew.until(lambda: crew.leader.leader._finished == {0: 1, 1: BUILT, 2: 1, 3: 1})
        crew.later = 500.0
        assert not got.over.wait(1.5)
        assert crew.leader.leader.state.formed
        crew.later = 700.0
        assert got.over.wait(20)
        assert got.tokens == answer(prompt(60), 12)
        assert crew.leader.leader.state.members == (0, 2, 3)
    finally:
        crew.close()


def test_a_rank_that_never_ends_its_step_does_not_keep_others_from_joining_for_ever() -> None:
    """The ring stops for who joins when the step under way is done, and no exchange waits for who hangs in it."""
    crew = Crew(
        4,
        limits=Limits(heartbeat=LIMIT_SECONDS, stop=1.0, form=5.0, gather=5.0),
        policy=Policy(window_tokens=16, short_tokens=16, prefix_block_tokens=16, park_seconds=10_000.0),
    )
    try:
        crew.formed(0, 1, 2, 3)
        crew.workers[3].kill()
        crew.formed(0, 1, 2)
        reached = in_step(crew, 1, "window")
        got = crew.ask(prompt(60), 12)  # in several windows on rank 0
        assert reached.wait(20)
        crew.until(lambda: crew.leader.leader._finished == {0: 1, 1: BUILT, 2: 1})
        crew.workers[3] = WorkerProcess(crew, 3)
        crew.until(lambda: not crew.leader.leader.state.formed)
        crew.later = 500.0
        assert not got.over.wait(1.5)
        assert not crew.leader.leader.state.formed
        crew.later = 700.0
        assert got.over.wait(20)
        assert got.tokens == answer(prompt(60), 12)
        assert crew.leader.leader.state.members == (0, 2, 3)
    finally:
        crew.close()


def test_a_rank_0_that_never_ends_a_step_by_itself_says_so(crew: Crew) -> None:
    """The others wait for it, and beat: nobody else would notice."""
    crew.formed(0, 1, 2, 3)
    reached, go_on = threading.Event(), threading.Event()

    def hook(process: Process, step: messages.Step) -> None:
        if process.ordinal == 0:
            crew.hooks.remove(hook)
            reached.set()
            go_on.wait(20)

    crew.hooks.append(hook)
    got = crew.ask(prompt(200), 12)
    assert reached.wait(20)
    engine = RingEngine(leader=crew.leader.leader, inbox=crew.leader.inbox)
    crew.later = PATIENT_SECONDS - 60
    assert engine.hung() is None
    crew.later = PATIENT_SECONDS + 60
    assert re.fullmatch(r"A step of this rank, .* has taken \d+ s, longer than 600 s: it hangs\.", engine.hung() or "")
    crew.later = 0.0
    go_on.set()
    assert got.over.wait(20)
    assert got.tokens == answer(prompt(200), 12)
    crew.later = 10 * PATIENT_SECONDS
    assert engine.hung() is None, "it waits for requests"


def test_a_rank_that_stood_still_keeps_what_nobody_computed_anew(crew: Crew) -> None:
    crew.formed(0, 1, 2, 3)
    first = crew.ask(prompt(400), 3)
    assert first.over.wait(20)
    crew.workers[2].stop()
    crew.formed(0, 1, 3)
    crew.workers[2].go_on()
    crew.formed(0, 1, 2, 3)
    again = crew.ask([*prompt(400), *first.tokens, 5], 10)
    assert again.over.wait(20)
    assert again.tokens == answer([*prompt(400), *first.tokens, 5], 10)
    assert crew.leader.leader.state.scheduler.counts["refilled_tokens"] == 0


def test_two_losses_wait_for_one_to_come_back_and_the_stream_goes_on(crew: Crew) -> None:
    crew.formed(0, 1, 2, 3)
    got = crew.ask(prompt(200), 60)
    assert got.first.wait(20)
    crew.workers[2].kill()
    crew.workers[3].kill()
    crew.until(lambda: not crew.leader.leader.state.formed)
    crew.workers[2] = WorkerProcess(crew, 2)
    assert got.over.wait(20)
    assert got.tokens == answer(prompt(200), 60)
    crew.formed(0, 1, 2)
    crew.workers[3] = WorkerProcess(crew, 3)
    crew.formed(0, 1, 2, 3)


def test_a_loss_while_the_ring_heals(crew: Crew) -> None:
    crew.formed(0, 1, 2, 3)
    got = crew.ask(prompt(300), 60)
    assert got.first.wait(20)
    crew.workers[1].kill()
    crew.formed(0, 2, 3)
    crew.workers[1] = WorkerProcess(crew, 1)
    crew.formed(0, 1, 2, 3)
    crew.workers[3].kill()
    assert got.over.wait(20)
    assert got.tokens == answer(prompt(300), 60)


def test_a_rank_that_leaves_breaks_no_step_and_changes_no_token(crew: Crew) -> None:
    crew.formed(0, 1, 2, 3)
    got = crew.ask(prompt(200), 60)
    assert got.first.wait(20)
    crew.workers[2].worker.leave()
    crew.formed(0, 1, 3)
    crew.workers[2].thread.join(20)
    assert not crew.workers[2].thread.is_alive()
    assert crew.workers[2].refused is None
    assert got.over.wait(20)
    assert got.tokens == answer(prompt(200), 60)
    state = crew.leader.leader.state
    assert (state.reforms["lost"], state.reforms["left"], state.recovery_seconds) == (0, 1, ())
    crew.workers[2].kill()  # its process has ended, and knocks at no port any more
    crew.workers[2] = WorkerProcess(crew, 2)
    crew.formed(0, 1, 2, 3)
    assert crew.leader.leader.state.reforms["left"] == 1


def test_a_short_request_that_comes_amid_a_window_waits_for_no_other() -> None:
    """By what was promised the long one, which has more to compute, would have to go on first."""
    policy = Policy(window_tokens=16, short_tokens=8, prefix_block_tokens=16, slice_seconds=0.1, ttft_seconds=100.0)
    crew = Crew(2, policy=policy)
    windows: list[messages.Window] = []
    short: list[tuple[int, Answer]] = []

    def began(process: Process, step: messages.Step) -> None:
        if process.ordinal or step.window is None:
            return
        windows.append(step.window)
        time.sleep(0.0002 * len(step.window.tokens))
        if not short and step.window.start > 2_000:
            short.append((len(windows), crew.ask(prompt(10), 1)))

    try:
        crew.formed(0, 1)
        crew.hooks.append(began)
        long = crew.ask(prompt(4_000), 1)
        assert long.over.wait(20)
    finally:
        crew.close()
    [(at, got)] = short
    assert got.tokens == answer(prompt(10), 1)
    assert len(windows[at].tokens) == 10
    assert len(windows) > at + 1, "the long one had more windows to come"


def test_another_promise_is_taken_on_while_the_ring_works(crew: Crew) -> None:
    def promised() -> float:
        return crew.leader.leader._scheduler.policy.ttft_seconds

    crew.leader.inbox.put(Promise(0.25))
    crew.formed(0, 1, 2, 3)
    crew.until(lambda: promised() == 0.25)
    crew.leader.inbox.put(Promise(0.5))
    crew.until(lambda: promised() == 0.5)


@pytest.mark.parametrize("in_order", [False, True])
def test_a_new_rank_0_finds_what_the_workers_hold(crew: Crew, in_order: bool) -> None:
    crew.formed(0, 1, 2, 3)
    asked = crew.ask(prompt(320), 4)
    assert asked.over.wait(20)
    if in_order:
        crew.leader.inbox.put(Shutdown(Refusal(503, "draining", "It stops.")))
        crew.leader.thread.join(20)
        crew.leader.hub.stop()
    else:
        crew.leader.kill()
    crew.leader = LeaderProcess(crew)
    crew.formed(0, 1, 2, 3)
    again = crew.ask(prompt(320), 8)
    assert again.over.wait(20)
    assert again.tokens == answer(prompt(320), 8)
    counts = crew.leader.leader.state.scheduler.counts
    assert counts["computed_tokens"] <= 320 // 4 + 16, "only the share of the rank 0 that is gone"
    assert counts["cached_tokens"] >= 220


def test_what_does_not_fit_three_ranks_waits_for_the_fourth() -> None:
    crew = Crew(
        4, capacity=120, policy=Policy(window_tokens=16, short_tokens=0, prefix_block_tokens=16, park_seconds=30.0)
    )
    try:
        crew.formed(0, 1, 2, 3)
        reached = in_step(crew, 1, "decode", batch=2)
        got = [crew.ask(prompt(150, seed), 40) for seed in range(2)]
        assert reached.wait(20)
        crew.workers[1].kill()
        # Not that it is parked now: when the other one has ended, it goes on even on three.
        crew.until(lambda: crew.leader.leader.state.scheduler.counts["parked_requests"] == 1)
        crew.workers[1] = WorkerProcess(crew, 1)
        for seed, each in enumerate(got):
            assert each.over.wait(20)
            assert each.tokens == answer(prompt(150, seed), 40)
    finally:
        crew.close()


def test_a_parked_request_that_waited_too_long_fails_with_a_sentence() -> None:
    crew = Crew(
        4, capacity=120, policy=Policy(window_tokens=16, short_tokens=0, prefix_block_tokens=16, park_seconds=600.0)
    )
    try:
        crew.formed(0, 1, 2, 3)
        reached = in_step(crew, 1, "decode")
        got = crew.ask(prompt(380), 40)
        assert reached.wait(20)
        crew.workers[1].kill()
        crew.formed(0, 2, 3)  # before that, it would be the ring that was away for too long
        assert crew.leader.leader.state.scheduler.parked == 1
        crew.later = 700.0
        assert got.over.wait(20)
        assert got.refusal is not None
        assert got.refusal.code == "ring_too_small"
    finally:
        crew.close()


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"world_size": 3}, "has WORLD_SIZE=3, rank 0 has 4; start all with the same WORLD_SIZE."),
        ({"config_hash": "1.1/abc"}, "runs version 1.1, rank 0 runs 1.0; give all ranks the same image."),
        ({"config_hash": "1.0/abd"}, "has the configuration abd, rank 0 has abc"),
    ],
)
def test_a_rank_of_another_ring_is_told_why_it_is_none(calm: Crew, other: dict[str, object], sentence: str) -> None:
    calm.formed(0, 1, 2, 3)
    stranger = WorkerProcess(calm, 2, **other)
    calm.until(lambda: stranger.refused is not None)
    assert sentence in (stranger.refused or "")
    stranger.kill()
    calm.formed(0, 1, 2, 3)


def test_a_request_whose_logits_are_no_numbers_fails_alone_and_the_ring_goes_on(crew: Crew) -> None:
    crew.formed(0, 1, 2, 3)
    epoch = crew.leader.leader.state.epoch
    bad, good = crew.ask(prompt(300), 4000), crew.ask(prompt(200, 1), 40)
    assert bad.first.wait(20)
    crew.nonsense.add(0)
    assert bad.over.wait(20)
    assert bad.refusal is not None
    assert (bad.refusal.status, bad.refusal.code) == (500, "not_finite")
    assert good.over.wait(20)
    assert good.tokens == answer(prompt(200, 1), 40)
    again = crew.ask(prompt(300), 5)
    assert again.over.wait(20)
    assert again.tokens == answer(prompt(300), 5)
    assert crew.leader.leader.state.scheduler.counts["cached_tokens"] == 0
    assert crew.leader.leader.state.epoch == epoch


def test_how_far_a_rank_was_with_its_weights_is_forgotten_when_it_is_gone(calm: Crew) -> None:
    calm.formed(0, 1, 2, 3)
    calm.leader.inbox.put(messages.Loading(7, 5, 10))
    calm.until(lambda: calm.leader.leader.state.loading == {7: 0.5})
    calm.leader.inbox.put(Gone(7))
    calm.until(lambda: calm.leader.leader.state.loading == {})


def test_who_joins_while_a_ring_is_formed_makes_it_no_loss_and_hides_none() -> None:
    leader = Leader(
        about=About("ring-0", "fake", 4, 100, "nowhere:1"),
        place=mock.Mock(),
        hub=mock.Mock(),
        inbox=SimpleQueue(),
        policy=Policy(),
        uniform=lambda: 0.5,
    )

    def formed_after(*fences: Fence) -> None:
        for fence in fences:
            leader._fence(fence)
        leader._resume(Formed(-1, (), seconds=3.0))

    formed_after()
    formed_after(Fence(1, "rank 3 is ready", abort=False), Fence(2, "rank 2 is ready", abort=True))
    assert (leader._state().reforms, leader._state().recovery_seconds) == ({"lost": 0, "left": 0, "joined": 1}, ())
    formed_after(Fence(3, "rank 2 is lost", abort=True, lost=True), Fence(4, "rank 2 is ready", abort=True))
    assert (leader._state().reforms, leader._state().recovery_seconds) == ({"lost": 1, "left": 0, "joined": 1}, (3.0,))


def test_what_nobody_wants_any_more_gives_back_its_room(crew: Crew) -> None:
    crew.formed(0, 1, 2, 3)
    got = crew.ask(prompt(300), 4000)
    assert got.first.wait(20)
    crew.cancel(1)
    crew.until(lambda: sum(crew.leader.leader.state.scheduler.active) == 0)
