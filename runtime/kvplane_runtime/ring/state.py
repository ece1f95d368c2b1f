"""What rank 0 knows of the ring at one moment: the source of ``/state``, ``/metrics``, ``/health`` and of progress; and
what a worker knows of itself.

``/state`` answers in the words of :class:`kvplane_api.wire.SidecarState`, so that who reads paged engines reads this one
too, with the member ``ring`` for what only a ring has.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel

from kvplane_api.wire import AdmissionState, EngineSignals, SidecarState
from kvplane_runtime.ring.messages import Traffic
from kvplane_runtime.ring.requests import Snapshot


@dataclass(frozen=True, slots=True)
class RankTraffic:
    """What the steps of one rank cost since the start, summed over epochs."""

    steps: int = 0
    seconds: float = 0.0
    compute_seconds: float = 0.0
    waited_seconds: float = 0.0
    """Communication that no computation hid."""
    sent_bytes: int = 0

    def plus(self, step: Traffic) -> "RankTraffic":
        """With one step more."""
        return RankTraffic(
            steps=self.steps + 1,
            seconds=self.seconds + step.seconds,
            compute_seconds=self.compute_seconds + step.compute_seconds,
            waited_seconds=self.waited_seconds + step.waited_seconds,
            sent_bytes=self.sent_bytes + step.sent_bytes,
        )


@dataclass(frozen=True, slots=True)
class WorkerAccount:
    """What a worker has to show."""

    epoch: int = -1
    """Of the ring that it is in, or was in last; -1: none yet."""
    kv_tokens: int = 0
    """Held, of requests and of kept prefixes."""
    traffic: RankTraffic = RankTraffic()


@dataclass(frozen=True, slots=True)
class State:
    """The ring now."""

    pod: str
    """Name of rank 0's pod."""
    served_name: str
    formed: bool
    """The ring of ``epoch`` works."""
    epoch: int
    """-1 before the first ring."""
    world_size: int
    """Ranks of a whole ring."""
    members: tuple[int, ...]
    """Ordinals of the members, by rank; of the ring that is, or was last."""
    loading: Mapping[int, float]
    """By ordinal, the share of the weights that is loaded, of those that are not done."""
    reforms: Mapping[str, int]
    """Rings formed after the first one, by cause: lost, left, joined."""
    recovery_seconds: tuple[float, ...]
    """From the detection of a loss until the ring worked again, of each time."""
    startup_seconds: float | None
    """From the start of the process to the first ring."""
    traffic: tuple[RankTraffic, ...]
    """By rank of the ring that is."""
    scheduler: Snapshot


class RingSignals(BaseModel):
    """What only a ring has."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)

    formed: bool
    epoch: int
    world_size: int
    members: tuple[int, ...]
    loading: dict[int, float]
    reforms: dict[str, int]
    last_recovery_seconds: float | None
    """``None`` if none was needed yet."""
    kv_tokens: tuple[int, ...]
    """Held, by rank."""
    kv_capacity_tokens: int
    """Of each rank."""
    parked: int
    kept_sequences: int
    refilled_tokens_total: int
    exposed_wait_ratio: float | None
    """Share of step time that ranks stood still for communication; ``None`` before the first step."""
    imbalance_ratio: float | None
    """Computing time of the busiest rank over the mean, less 1; ``None`` before the first step."""


class RingState(SidecarState):
    """Answer of ``GET /state``."""

    ring: RingSignals


def exposed_wait(state: State) -> float | None:
    """Share of step time that ranks stood still for communication."""
    total = sum(rank.seconds for rank in state.traffic)
    return sum(rank.waited_seconds for rank in state.traffic) / total if total > 0 else None


def imbalance(state: State) -> float | None:
    """Computing time of the busiest rank over the mean of all, less 1."""
    times = [rank.compute_seconds for rank in state.traffic]
    mean = sum(times) / len(times) if times else 0.0
    return max(times) / mean - 1 if mean > 0 else None


def max_model_tokens(state: State) -> int:
    """Longest prompt + output that the ring takes when it is empty and whole: what is refused for good is so by this."""
    whole, longest = state.scheduler.whole_tokens, state.scheduler.longest_tokens
    return whole if longest is None else min(whole, longest)


def room(snapshot: Snapshot) -> int:
    """KV tokens of each rank that are for requests in progress: what is kept free for a lost rank would never be used up, and
    who adds rings by their usage would never see a full one. Where all of it is kept free, all of it is told.
    """
    return snapshot.limit_tokens or snapshot.capacity_tokens


def usage(snapshot: Snapshot) -> float:
    """Share of the ring's room that requests in progress hold or have reserved, on the fullest rank; after a loss they may have
    more than that, which is 1.
    """
    return min(1.0, max(snapshot.active) / room(snapshot))


def processed_tokens(snapshot: Snapshot) -> int:
    """Prompt tokens computed or found, each once: what was admitted may be minutes from being computed."""
    counts = snapshot.counts
    return counts["cached_tokens"] + counts["computed_tokens"] - counts["refilled_tokens"]


def wire(state: State, *, draining: bool, in_flight: int) -> RingState:
    """``state`` as ``/state`` gives it."""
    scheduler = state.scheduler
    counts, ranks = scheduler.counts, len(scheduler.held)
    running = scheduler.decoding + scheduler.prefilling
    refused = sum(counts[name] for name in ("refused_never", "refused_kv", "refused_requests"))
    return RingState(
        pod=state.pod,
        served_name=state.served_name,
        engine_ready=state.formed,
        draining=draining,
        in_flight=in_flight,
        signal_age_seconds=0.0,
        startup_seconds=state.startup_seconds,
        engine=EngineSignals(
            kv_cache_usage_ratio=usage(scheduler),
            kv_cache_capacity_tokens=room(scheduler) * ranks,
            requests_running=running,
            requests_waiting=scheduler.waiting + scheduler.parked,
            waiting_prompt_tokens=scheduler.waiting_prompt_tokens,
            waiting_kv_tokens=scheduler.waiting_kv_tokens,
            preemptions_total=0,
            prompt_tokens_total=processed_tokens(scheduler),
            prefix_hits_tokens_total=counts["cached_tokens"],
            generation_tokens_total=counts["generated_tokens"],
            max_model_len_tokens=max_model_tokens(state),
        ),
        admission=AdmissionState(
            policy="Enforce",
            running=running + scheduler.waiting + scheduler.parked,
            queued=0,  # it admits at once or refuses: what waits, waits in the engine
            queued_prompt_tokens=0,
            queued_reservation_tokens=0,
            reserved_tokens=sum(scheduler.active),
            kv_peak_ratio=usage(scheduler),
            kappa=1.0,
            admitted_total=counts["admitted"],
            refused_total=refused,
            shed_reservation_tokens_total=counts["refused_reservation_tokens"],
        ),
        ring=RingSignals(
            formed=state.formed,
            epoch=state.epoch,
            world_size=state.world_size,
            members=state.members,
            loading=dict(state.loading),
            reforms=dict(state.reforms),
            last_recovery_seconds=state.recovery_seconds[-1] if state.recovery_seconds else None,
            kv_tokens=scheduler.held,
            kv_capacity_tokens=scheduler.capacity_tokens,
            parked=scheduler.parked,
            kept_sequences=scheduler.kept,
            refilled_tokens_total=counts["refilled_tokens"],
            exposed_wait_ratio=exposed_wait(state),
            imbalance_ratio=imbalance(state),
        ),
    )
