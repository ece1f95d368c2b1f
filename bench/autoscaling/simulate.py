"""One run: arrivals, replicas that start and drain, a scaler that sees old figures, and what became of the requests.

Time goes in steps of half a second, in which the scaler's world is still; within a step each replica works on by events.
A request goes to the ready replica with the fewest tokens, up to a step late, for every contestant alike. While none is
ready it waits in front, as at a gateway, for as long as it may wait for its first token. A replica costs from the moment it
is asked for until it has drained.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from bench.admission.workload import Arrival
from bench.autoscaling.replica import GOALS, Engine, Gate, Goals, Job, Replica
from bench.autoscaling.scalers import Scaler, Scraped, Seen

STEP: Final = 0.5
_DRAIN_SECONDS: Final = 120.0
"""After the last arrival, for requests to end."""
_PEAK_SECONDS: Final = 60.0


@dataclass(frozen=True)
class World:
    """All of a run but its traffic and its scaler."""

    engine: Engine
    gated: bool
    """Whether our admission stands in front of each engine."""
    startup_seconds: float
    scrape_seconds: float
    goals: Goals = GOALS
    begin_replicas: int = 1
    silent: tuple[tuple[float, float], ...] = ()
    """Times in which no scrape succeeds."""
    cached_share: float = 0.0
    """Of each prompt, what the prefix cache has."""


@dataclass(frozen=True)
class Outcome:
    """One run."""

    jobs: Sequence[Job]
    goals: Goals
    replica_seconds: float
    lost_tokens: float
    counts: Sequence[tuple[float, int, int]]
    """(time, asked, ready) at each change."""
    seconds: float

    @property
    def goodput_percent(self) -> float:
        """Share of all requests that met both goals; refused ones did not."""
        return self._met_percent(self.jobs)

    @property
    def hours(self) -> float:
        """Replica-hours."""
        return self.replica_seconds / 3600

    @property
    def lost_percent(self) -> float:
        """Of the tokens computed, those computed again; what was not finished is left out."""
        useful = sum(job.fresh + job.output for job in self.jobs if job.done_at is not None)
        return 100.0 * self.lost_tokens / max(1.0, useful + self.lost_tokens)

    @property
    def reversals_per_hour(self) -> float:
        """How often what was asked for turned from up to down or back."""
        asked = [asked for _, asked, _ in self.counts]
        moves = [after > before for before, after in pairwise(asked) if after != before]
        turns = sum(before != after for before, after in pairwise(moves))
        return turns * 3600 / self.seconds

    def goodput_between(self, begin: float, end: float) -> float:
        """Of the requests that came in that time, as goodput_percent."""
        return self._met_percent([job for job in self.jobs if begin <= job.at < end])

    def ready_between(self, begin: float, end: float) -> tuple[tuple[float, int], ...]:
        """(seconds since ``begin``, replicas ready) at ``begin`` and at each change until ``end``."""
        later = ((at - begin, ready) for at, _, ready in self.counts if begin < at < end)
        return ((0.0, self.ready_at(begin)), *later)

    def ready_at(self, at: float) -> int:
        """Replicas ready at a time."""
        return next((ready for since, _, ready in reversed(self.counts) if since <= at), 0)

    def seconds_to(self, replicas: int, *, since: float) -> float | None:
        """Until so many were ready, counted from ``since``; None if they never were."""
        if self.ready_at(since) >= replicas:
            return 0.0
        return next((at - since for at, _, ready in self.counts if at > since and ready >= replicas), None)

    def _met_percent(self, jobs: Sequence[Job]) -> float:
        met = sum(job.good(self.goals) for job in jobs)
        return 100.0 * met / len(jobs)


@dataclass(slots=True, eq=False)
class _Pod:
    name: str
    created_at: float
    ready_at: float
    replica: Replica
    draining: bool = False
    scraped: Scraped | None = None
    lost_before: float = 0.0
    peaks: deque[tuple[float, float, int]] = field(default_factory=deque)


def simulate(arrivals: Sequence[Arrival], world: World, scaler: Scaler) -> Outcome:
    """The run; ``scaler`` is made anew for it."""
    return _Run(arrivals, world, scaler).outcome()


class _Run:
    def __init__(self, arrivals: Sequence[Arrival], world: World, scaler: Scaler) -> None:
        self._world = world
        self._scaler = scaler
        self._jobs = [
            # An engine always computes a prompt's last token: the first output comes from it.
            Job(
                each.at,
                each.prompt_tokens,
                each.output_tokens,
                cached=min(int(world.cached_share * each.prompt_tokens), each.prompt_tokens - 1),
            )
            for each in arrivals
        ]
        self._pods: list[_Pod] = []
        self._born = 0
        self._asked = 0
        self._in_front: deque[Job] = deque()
        self._replica_seconds = 0.0
        self._lost = 0.0
        self._counts: list[tuple[float, int, int]] = []

    def outcome(self) -> Outcome:
        world, coming = self._world, 0
        last = self._jobs[-1].at
        self._scale(world.begin_replicas, now=-world.startup_seconds)
        scrape_at = decide_at = now = 0.0
        while now < last + _DRAIN_SECONDS:
            while coming < len(self._jobs) and self._jobs[coming].at <= now:
                self._in_front.append(self._jobs[coming])
                coming += 1
            self._route(now)
            if now >= scrape_at:
                scrape_at = now + world.scrape_seconds
                if not any(begin <= now < end for begin, end in world.silent):
                    self._scrape(now)
            if now >= decide_at and now <= last:
                decide_at = now + self._scaler.tick_seconds
                self._scale(self._scaler.decide(self._asked, self._seen(now), now), now=now)
            self._advance(now, charged=now <= last)
            now += STEP
        return Outcome(
            jobs=self._jobs,
            goals=world.goals,
            replica_seconds=self._replica_seconds,
            lost_tokens=self._lost + sum(pod.replica.totals.lost_tokens for pod in self._pods),
            counts=self._counts,
            seconds=last,
        )

    def _route(self, now: float) -> None:
        serving = [pod.replica for pod in self._pods if pod.ready_at <= now and not pod.draining]
        while self._in_front:
            job = self._in_front[0]
            if serving:
                min(serving, key=lambda replica: replica.load).offer(job, now)
            elif now - job.at <= self._world.goals.ttft_seconds:
                break
            else:
                job.refused = True
            self._in_front.popleft()

    def _advance(self, now: float, *, charged: bool) -> None:
        for pod in self._pods:
            if pod.ready_at <= now:
                pod.replica.advance(now, STEP)
        if charged:
            self._replica_seconds += STEP * len(self._pods)
        for pod in [pod for pod in self._pods if pod.draining and not (pod.replica.running or pod.replica.waiting)]:
            self._lost += pod.replica.totals.lost_tokens
            self._pods.remove(pod)
        self._note(now + STEP)

    def _scale(self, desired: int, *, now: float) -> None:
        """Ask for so many: new ones start; first those that do not serve go, then the emptiest."""
        stay = [pod for pod in self._pods if not pod.draining]
        for pod in sorted(stay, key=lambda pod: (pod.ready_at <= now, pod.replica.load, -pod.created_at))[
            : max(0, len(stay) - desired)
        ]:
            pod.draining = True
        gate = Gate(self._world.goals.ttft_seconds) if self._world.gated else None
        for _ in range(desired - len(stay)):
            self._born += 1
            ready_at = now + self._world.startup_seconds
            self._pods.append(
                _Pod(f"pod-{self._born}", now, ready_at, Replica(self._world.engine, gate, self._world.goals))
            )
        self._asked = desired
        self._note(now)

    def _note(self, now: float) -> None:
        ready = sum(pod.ready_at <= now and not pod.draining for pod in self._pods)
        if not self._counts or self._counts[-1][1:] != (self._asked, ready):
            self._counts.append((now, self._asked, ready))

    def _seen(self, now: float) -> list[Seen]:
        return [
            Seen(pod.name, pod.created_at, pod.ready_at <= now, pod.scraped if pod.ready_at <= now else None)
            for pod in self._pods
            if not pod.draining
        ]

    def _scrape(self, now: float) -> None:
        for pod in self._pods:
            if pod.ready_at <= now and not pod.draining:
                pod.scraped = _scraped(pod, now)


def _scraped(pod: _Pod, now: float) -> Scraped:
    replica, totals, before = pod.replica, pod.replica.totals, pod.scraped
    tokens = float(replica.engine.kv_tokens)
    usage = min(1.0, replica.context / tokens)
    pod.peaks.append((now, usage, len(replica.waiting)))
    while pod.peaks[0][0] <= now - _PEAK_SECONDS:
        pod.peaks.popleft()
    lost = 0.0
    if before is not None and now > before.at:
        lost = (totals.lost_tokens - pod.lost_before) / (now - before.at)
    pod.lost_before = totals.lost_tokens
    admitted = max(1, totals.admitted)
    return Scraped(
        at=now,
        kv_tokens=tokens,
        used_tokens=usage * tokens,
        reserved_tokens=replica.reserved if replica.gate is not None else 0.0,
        queued_tokens=sum(replica.expected(job) for job in replica.waiting),
        queued_prompt_tokens=float(sum(job.prompt for job in replica.waiting)),
        running=replica.running,
        waiting=len(replica.waiting),
        admitted=totals.admitted,
        refused=totals.refused,
        shed_tokens=totals.shed_tokens,
        prompt_tokens=totals.prompt_tokens,
        prefix_hits_tokens=totals.prefix_hits_tokens,
        generation_tokens=totals.generation_tokens,
        kept=totals.kept,
        broken=totals.broken,
        lost_tokens_per_second=lost,
        mean_prompt_tokens=totals.prompt_tokens / admitted,
        peak_usage=max(usage for _, usage, _ in pod.peaks),
        peak_waiting=max(waiting for _, _, waiting in pod.peaks),
        max_batched_tokens=replica.engine.max_batched_tokens,
        max_sequences=replica.engine.max_sequences,
        forward_pass=replica.forward_pass(),
    )
