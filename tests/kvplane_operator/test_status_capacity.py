"""Figures of KV memory in status: sums only of what is known, in steps, at most once a minute."""

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane_operator.plan.signals import MOST_USAGE
from kvplane_operator.plan.snapshot import Reading
from tests.kvplane_operator.world import RUNNING, World, pod, settled, state

SECOND = timedelta(seconds=1)


def serving(*states: Any, **admission: Any) -> World:
    """One ready pod for each of the states: fields of the engine, or None for a pod that was not read."""
    world = settled({"model": {"source": "hf://a/b"}, "replicas": len(states), "admission": admission})
    read(world, *states)
    return world


def read(world: World, *states: Any, **fields: Any) -> World:
    world.counts(replicas=len(states), ready=len(states))
    world.pods = [pod(f"chat-{n}", ready=True, engine=RUNNING) for n in range(len(states))]
    world.readings = {
        f"chat-{n}": Reading(state(f"chat-{n}", engine=engine, **fields))
        for n, engine in enumerate(states)
        if engine is not None
    }
    return world


def used(ratio: float | None) -> dict[str, Any]:
    return {"kvCacheUsageRatio": ratio}


def capacity(world: World) -> Any:
    return world.plan().status["capacity"]


def pool(world: World) -> tuple[Any, Any]:
    (found,) = world.plan().status["pools"]
    return found.get("kvTokensPerReplica"), found.get("maxContextTokens")


class TestWhatIsKnown:
    def test_one_replica(self) -> None:
        expected = {"kvTokens": 1600, "kvUsedPercent": 40, "headroomTokens": 880, "startupSecondsP90": 42}
        assert capacity(serving(used(0.4))) == expected

    def test_the_sum_of_all(self) -> None:
        world = serving(used(0.1), {**used(0.9), "kvCacheCapacityTokens": 4800})
        assert (capacity(world)["kvTokens"], capacity(world)["kvUsedPercent"]) == (6400, 70)

    def test_an_idle_engine_is_known_to_be_empty(self) -> None:
        assert capacity(serving(used(0.0)))["kvUsedPercent"] == 0

    def test_more_in_use_than_there_is_counts_as_full(self) -> None:
        """Of a ratio up to MOST_USAGE is believed that it is 1, and in status there is no more than 100 %."""
        assert capacity(serving(used(MOST_USAGE)))["kvUsedPercent"] == 100

    def test_nothing_serves(self) -> None:
        world = settled()
        assert (capacity(world), pool(world)) == (None, (None, None))

    @pytest.mark.parametrize(
        ("lost", "left"),
        [
            ("kvCacheUsageRatio", {"kvTokens", "startupSecondsP90"}),
            ("kvCacheCapacityTokens", {"startupSecondsP90"}),
        ],
    )
    def test_what_one_pod_does_not_know_nobody_knows(self, lost: str, left: set[str]) -> None:
        assert set(capacity(serving(used(0.4), {lost: None}))) == left

    @pytest.mark.parametrize("fields", [{"pod": "mail-1"}, {"signalAgeSeconds": 60.0}])
    def test_a_pod_that_cannot_be_counted_on_makes_the_sum_unknown(self, fields: dict[str, Any]) -> None:
        world = serving({}, {})
        world.readings["chat-1"] = Reading(state("chat-1", **fields))
        assert capacity(world) is None
        assert pool(world) == (1600, 1520)  # the other one's

    def test_figures_stay_while_a_new_pod_was_not_read(self) -> None:
        world = serving(used(0.4))
        world.settle()
        before = world.status
        read(world, used(0.8), None)
        assert capacity(world) == before["capacity"]
        assert pool(world) == (1600, 1520)

    def test_figures_go_with_the_last_pod(self) -> None:
        world = serving(used(0.4))
        world.settle()
        read(world)
        assert (capacity(world), pool(world)) == (None, (None, None))

    def test_figures_stay_while_the_spec_cannot_be_read(self) -> None:
        world = serving(used(0.4))
        world.settle()
        before = world.status["capacity"]
        world.change(ring={"size": 2})
        read(world, used(0.9))
        assert (capacity(world), pool(world)) == (before, (1600, 1520))


class TestHeadroom:
    @pytest.mark.parametrize(
        ("ratio", "reserved", "percent"),
        [
            (0.0, 0, 95),
            (0.4, 0, 55),
            (0.4, 800, 45),  # what is expected counts where it is more than what is held
            (0.99, 0, 0),
            (0.4, 16_000, 0),
        ],
    )
    def test_below_the_hard_cap(self, ratio: float, reserved: int, percent: int) -> None:
        world = serving(used(ratio))
        read(world, used(ratio), admission={"reservedTokens": reserved})
        assert capacity(world)["headroomTokens"] == percent * 1600 // 100

    def test_a_full_replica_takes_nothing_from_the_others(self) -> None:
        assert capacity(serving(used(1.0), used(0.0)))["headroomTokens"] == 45 * 3200 // 100

    def test_a_lower_cap_leaves_less(self) -> None:
        assert capacity(serving(used(0.0), kvHardCapPercent=50))["headroomTokens"] == 800


class TestOneReplica:
    @pytest.mark.parametrize(
        ("engine", "admission", "context"),
        [
            ({"maxModelLenTokens": 1000}, {}, 1000),
            ({"maxModelLenTokens": 1600}, {}, 1520),
            ({"maxModelLenTokens": 1600}, {"kvHardCapPercent": 94}, 1504),
            ({"maxModelLenTokens": 1600}, {"kvHardCapPercent": 91}, 1456),
            ({"maxModelLenTokens": 1600, "kvCacheBlockSizeTokens": 128}, {}, 1408),  # whole blocks
            ({"maxModelLenTokens": 1600}, {"policy": "Observe"}, 1600),
            ({"maxModelLenTokens": 1600}, {"policy": "Off"}, 1600),
            ({"maxModelLenTokens": None}, {}, None),
            ({"kvCacheCapacityTokens": None}, {}, None),
        ],
    )
    def test_longest_context(self, engine: dict[str, Any], admission: dict[str, Any], context: int | None) -> None:
        assert pool(serving(engine, **admission))[1] == context

    def test_the_smallest_replica_counts(self) -> None:
        assert pool(serving({}, {"kvCacheCapacityTokens": 800, "maxModelLenTokens": 500})) == (800, 500)


class TestStartup:
    @staticmethod
    def p90(*seconds: float | None, restarts: int = 0) -> int | None:
        world = read(serving(*({} for _ in seconds)), *({} for _ in seconds))
        for n, value in enumerate(seconds):
            world.readings[f"chat-{n}"] = Reading(state(f"chat-{n}", startupSeconds=value))
        world.pods[0]["status"]["initContainerStatuses"][0]["restartCount"] = restarts
        found: int | None = capacity(world).get("startupSecondsP90")
        return found

    def test_nearest_rank(self) -> None:
        assert self.p90(*range(1, 11)) == 9
        assert self.p90(*range(1, 12)) == 10
        assert self.p90(5.2, 7.4) == 8

    def test_pods_that_do_not_know_are_left_out(self) -> None:
        assert self.p90(7, None) == 7
        assert self.p90(None) is None

    def test_a_restarted_sidecar_measured_no_start(self) -> None:
        assert self.p90(1, 60, restarts=1) == 60
        assert self.p90(1, restarts=1) is None


class TestRarely:
    def at(self, world: World, ratio: float, *, after: float) -> int:
        """Settle with that usage, that long after the last time; the figure that stands then."""
        world.now += after * SECOND
        read(world, used(ratio))
        world.settle()
        found: int = world.status["capacity"]["kvUsedPercent"]
        return found

    def test_at_most_once_a_minute(self) -> None:
        world = serving(used(0.1))
        shown = [self.at(world, ratio, after=after) for ratio, after in ((0.1, 0), (0.5, 20), (0.7, 39), (0.9, 1))]
        assert shown == [10, 10, 10, 90]

    def test_a_change_that_waits_wakes_the_service(self) -> None:
        world = serving(used(0.1))
        self.at(world, 0.1, after=0)
        assert world.plan().wake_after_seconds is None
        self.at(world, 0.5, after=20)
        assert world.plan().wake_after_seconds == 40

    def test_less_than_a_step_is_no_change(self) -> None:
        world = serving(used(0.4))
        shown = [self.at(world, ratio, after=100) for ratio in (0.4, 0.426, 0.374, 0.449, 0.351, 0.45)]
        assert shown == [40, 40, 40, 40, 40, 45]

    def test_after_a_restart_of_the_operator_the_first_change_is_shown_at_once(self) -> None:
        world = serving(used(0.1))
        self.at(world, 0.1, after=0)
        world.capacity_written = None
        assert self.at(world, 0.5, after=1) == 50

    def test_what_is_unknown_goes_at_once_and_comes_back_at_once(self) -> None:
        world = serving(used(0.1))
        self.at(world, 0.1, after=0)
        read(world, used(None))
        assert set(capacity(world)) == {"kvTokens", "startupSecondsP90"}
        world.settle()
        assert self.at(world, 0.5, after=1) == 50

    @given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 30_000)), min_size=1, max_size=20))
    def test_figures_are_steps_near_the_truth(self, course: list[tuple[float, int]]) -> None:
        tokens = 1600
        world = serving(used(0))
        for ratio, reserved in course:
            world.now += 60 * SECOND
            read(world, used(ratio), admission={"reservedTokens": reserved})
            figures = world.settle().status["capacity"]
            free = max(0, 0.95 * tokens - max(ratio * tokens, reserved))
            assert figures["kvUsedPercent"] % 5 == 0
            assert abs(figures["kvUsedPercent"] - 100 * ratio) <= 5.1  # a token is 0.06 %
            assert figures["headroomTokens"] % (5 * tokens // 100) == 0
            assert figures["headroomTokens"] <= free + 1
            assert free < figures["headroomTokens"] + 10 * tokens / 100
            assert world.plan().status == world.settle().status
