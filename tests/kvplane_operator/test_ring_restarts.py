"""The restart budget: every exit counts once, whatever becomes of pods, leaders and windows."""

import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane_api.conditions import Reason
from kvplane_operator.plan.findings import Finding
from kvplane_operator.plan.ring import restarts
from kvplane_operator.plan.ring.restarts import Ledger, Restarts
from tests.kvplane_operator.ring_groups import group
from tests.kvplane_operator.world import NOW, RUNNING, crashed, pod, waiting

WINDOW = timedelta(hours=1)
CRASH = Finding("chat-ring-0-1", Reason.ENGINE_CRASHED, "It exited. Last log lines:\nno such model")


def rank(uid: str = "a", *, going: bool = False, **statuses: Any) -> dict[str, Any]:
    made = pod("chat-ring-0-1", **statuses)
    made["metadata"]["uid"] = uid
    if going:
        made["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
    return made


def exited(uid: str, times: int, *, going: bool = False) -> dict[str, Any]:
    """A pod whose engine has exited so often, and runs."""
    return rank(uid, going=going, engine={**crashed(restarts=times), **RUNNING} if times else RUNNING)


def count(
    before: Restarts | None, *pods: dict[str, Any], now: datetime = NOW, found: Sequence[Finding] = (CRASH,)
) -> Restarts | None:
    return restarts.counted(before, 0, pods, findings=found, now=now, window=WINDOW)


class TestExits:
    @pytest.mark.parametrize(
        ("statuses", "exits"),
        [
            ({}, 0),
            ({"engine": RUNNING}, 0),
            ({"engine": {"state": {"terminated": {"exitCode": 1}}}}, 1),
            ({"engine": crashed(restarts=0)}, 1),  # waits in the back-off for its first restart
            ({"engine": {**crashed(restarts=1), **RUNNING}}, 1),  # runs again
            ({"engine": crashed(restarts=1)}, 2),  # exited a second time
            ({"engine": waiting("ImagePullBackOff")}, 0),
            ({"engine": crashed(restarts=2), "sidecar": {**crashed(restarts=1), **RUNNING}}, 3),
            ({"engine": RUNNING, "sidecar": {**crashed(restarts=1), **RUNNING}}, 1),
            ({kind: {**crashed(restarts=3), **RUNNING} for kind in ("engine", "sidecar")}, 3),  # its node was rebooted
        ],
    )
    def test_are_restarts_and_those_that_wait_for_one(self, statuses: dict[str, Any], exits: int) -> None:
        assert restarts.exits(rank(**statuses)) == exits

    def test_of_a_users_own_container_are_its_own_business(self) -> None:
        made = rank()
        made["status"]["containerStatuses"].append({"name": "logger", "restartCount": 9})
        assert restarts.exits(made) == 0


class TestCounting:
    def test_nothing_is_kept_where_nothing_happened(self) -> None:
        assert count(None, exited("a", 0)) is None

    def test_the_first_exit_opens_the_window_and_says_why(self) -> None:
        found = count(None, exited("a", 1))
        assert found == Restarts(0, 1, NOW, "EngineCrashed", CRASH.message, {"a": 1})

    def test_what_was_counted_is_not_counted_again(self) -> None:
        once = count(None, exited("a", 2))
        assert count(once, exited("a", 2), now=NOW + timedelta(minutes=1)) == once

    def test_the_first_message_stays(self) -> None:
        once = count(None, exited("a", 1))
        later = count(once, exited("a", 3), found=[Finding("x", Reason.OUT_OF_MEMORY, "later")])
        assert later is not None
        assert (later.count, later.message) == (3, CRASH.message)

    def test_a_pod_made_anew_begins_at_0_and_the_budget_does_not(self) -> None:
        once = count(None, exited("a", 3))
        again = count(once, exited("b", 2))
        assert again is not None
        assert (again.count, again.pods) == (5, {"b": 2})

    def test_how_a_pod_ends_that_was_told_to_go_is_nobodys_fault(self) -> None:
        once = count(None, exited("a", 1))
        assert count(once, exited("a", 3, going=True)) == once

    def test_after_the_window_the_next_exit_opens_another(self) -> None:
        once = count(None, exited("a", 5))
        later = NOW + WINDOW
        quiet = count(once, exited("a", 5), now=later)
        assert quiet is not None
        assert (quiet.count, quiet.pods) == (0, {"a": 5})  # remembered, or they would count once more
        assert count(quiet, exited("a", 5), now=later + WINDOW) == quiet
        again = count(quiet, exited("a", 6), now=later)
        assert again is not None
        assert (again.count, again.window_start) == (1, later)

    def test_nothing_is_remembered_of_pods_that_are_gone(self) -> None:
        once = count(None, exited("a", 1))
        assert count(once, exited("b", 0), now=NOW + WINDOW) is None

    def test_an_exit_that_nobody_saw_is_told_of_all_the_same(self) -> None:
        found = count(None, exited("a", 1), found=())
        assert found is not None
        assert (found.reason, found.message) == ("EngineCrashed", "A container of ring group 0 exited, and runs again.")


class TestVerdict:
    def judged(self, exits: int, *, down_seconds: float | None, exited: tuple[int, ...] = (0,)) -> bool:
        found = group(0, down_seconds=down_seconds, exited=exited)
        spent = Restarts(0, exits, NOW)
        return restarts.given_up(found, spent, budget=5, now=NOW, grace_seconds=30)

    def test_within_the_budget_a_group_may_take_its_time(self) -> None:
        assert not self.judged(5, down_seconds=3600)

    def test_over_the_budget_and_without_a_ring(self) -> None:
        assert self.judged(6, down_seconds=30)

    def test_a_ring_that_forms_anew_is_given_its_grace(self) -> None:
        assert not self.judged(6, down_seconds=29)

    @pytest.mark.parametrize(("exited", "verdict"), [((), False), ((2,), False), ((0,), True), ((1, 2), True)])
    def test_what_loads_is_left_alone_unless_others_keep_it_from_a_ring(
        self, exited: tuple[int, ...], verdict: bool
    ) -> None:
        """A rank 0 that was moved to another node may load for minutes, while another rank has used up the budget."""
        assert self.judged(100, down_seconds=3600, exited=exited) is verdict

    def test_a_ring_that_serves_goes_on(self) -> None:
        assert not self.judged(100, down_seconds=None)

    def test_without_exits_there_is_nothing_to_judge(self) -> None:
        found = group(0, down_seconds=9999, exited=(0,))
        assert not restarts.given_up(found, None, budget=0, now=NOW, grace_seconds=30)


class TestLedger:
    LEDGER = Ledger(
        {0: Restarts(0, 6, NOW, "EngineCrashed", "why", {"a": 4, "b": 2}), 2: Restarts(2, 1, NOW, "OOMKilled", "", {})},
        frozenset({0}),
        "once",
        "hash",
    )

    def test_is_read_as_it_was_written(self) -> None:
        assert restarts.ledger(restarts.written(self.LEDGER, existing={0, 1, 2})) == self.LEDGER

    def test_groups_that_are_gone_are_forgotten(self) -> None:
        held = restarts.ledger(restarts.written(self.LEDGER, existing={2}))
        assert (set(held.restarts), held.failed) == ({2}, frozenset())

    def test_what_a_thousand_groups_say_can_be_written(self) -> None:
        """etcd takes a request of 1.5 MiB."""
        many = {number: Restarts(number, 6, NOW, "EngineCrashed", "x" * 9999, {}) for number in range(1000)}
        found = restarts.written(Ledger(many, frozenset({999})), existing=range(1000))
        assert len(json.dumps(found)) < 500_000
        assert [entry["group"] for entry in found["restarts"]] == [*range(1000)]
        assert [entry["group"] for entry in found["restarts"] if entry["message"]] == [*range(31), 999]

    def test_an_empty_one_says_nothing(self) -> None:
        assert restarts.written(Ledger(), existing={0}) == {}

    def test_a_reset_gives_the_budget_back_and_counts_nothing_twice(self) -> None:
        held = restarts.reset(self.LEDGER, retry="twice", spec="other")
        assert (held.failed, held.retry, held.spec, set(held.restarts)) == (frozenset(), "twice", "other", {0})
        after = count(held.restarts[0], exited("a", 4), exited("b", 2))
        assert after is not None
        assert after.count == 0
        again = count(after, exited("a", 5), exited("b", 2))
        assert again is not None
        assert (again.count, again.window_start) == (1, NOW)

    def test_what_somebody_else_wrote_is_left_out(self) -> None:
        assert restarts.ledger({"restarts": [{"group": 0, "count": 3, "windowStart": "yesterday"}]}).restarts == {}


deeds = st.lists(
    st.tuples(st.sampled_from(["exit", "recreate", "look", "restart operator", "go"]), st.integers(0, 2)), max_size=40
)


@given(deeds)
def test_within_a_window_every_exit_counts_once(history: list[tuple[str, int]]) -> None:
    """However pods are made anew, and whoever looks; what happens between two looks of a pod that is gone is lost."""
    pods = {ordinal: (f"{ordinal}-0", 0) for ordinal in range(3)}
    made, happened = 0, 0
    before: Restarts | None = None
    for deed, ordinal in history:
        uid, exits = pods[ordinal]
        going = deed == "go"
        if deed == "exit":
            pods[ordinal] = (uid, exits + 1)
            happened += 1
        elif deed == "recreate":
            made += 1
            pods[ordinal] = (f"{ordinal}-{made}", 0)
        elif deed == "restart operator":
            held = {} if before is None else {0: before}
            written = restarts.written(Ledger(held), existing={0})
            before = restarts.ledger(written).restarts.get(0)
        shown = [exited(u, n, going=going and o == ordinal) for o, (u, n) in pods.items()]
        before = count(before, *shown)
        assert (before.count if before else 0) == happened
