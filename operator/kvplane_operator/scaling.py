"""The autoscaler's shell: it reads the pods, has the law decide, and hands the figure on.

One loop looks twice a second whose turn comes before it looks again, and each round begins at its own moment: within five
seconds of a signal a busy service has its replicas, within fifteen any. One whose spec changed, or for which somebody asks by
the wake annotation, has its turn at once. A round reads all pods of a service at the same time, decides, and leaves the figure
in the store, whence the next plan takes it; it writes no replicas itself. Then it says why, in an event, and now and then
keeps what was learned in a ConfigMap.

Only the leader decides, and not before it has seen all that exists: a pod that was overlooked would be taken for one that has
just started. One that lost the Lease forgets everything: when it leads again, the children and the ConfigMap say where
things stand, as they do after a restart.
"""

import asyncio
import logging
import random
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from pydantic import ValidationError

from kvplane_api import names
from kvplane_api.service import LLMServiceSpec
from kvplane_operator import metrics
from kvplane_operator.autoscaler import document, view
from kvplane_operator.autoscaler.history import History, fresh
from kvplane_operator.autoscaler.law import Decision, Reason, decide, few
from kvplane_operator.autoscaler.settings import Tuning
from kvplane_operator.autoscaler.signals import Signals
from kvplane_operator.cluster import ApiError, Cluster
from kvplane_operator.events import event_of
from kvplane_operator.leader import NotLeadingError
from kvplane_operator.plan.children import finished, manifest
from kvplane_operator.plan.mode import Mode, choose, other
from kvplane_operator.plan.scaling import decides, followed, native, state_ref, with_replicas
from kvplane_operator.plan.snapshot import Kind, Scaling, Snapshot
from kvplane_operator.scaling_metrics import Counts, Report
from kvplane_operator.store import Store

logger = logging.getLogger(__name__)

LOOK_SECONDS: Final = 0.5
QUIET_SECONDS: Final = 15.0
"""From a signal of a service that nobody uses to its replicas, at most; of one that is used it is the tick."""
MARGIN_SECONDS: Final = 0.25
"""Of these, what is left for reading the pods, deciding and writing the replicas."""
BLIND_SECONDS: Final = 15.0
"""For so long signals must be missing before the condition says so: one slow poll is no news."""
MAXIMUM_SECONDS: Final = 60.0
"""For so long the condition says that maxReplicas held the service back: demand moves with every step of an engine."""
SAVE_SECONDS: Final = 300.0
"""Between two writes of what was learned; a panic and a wake-up are written at once."""
SAVE_AGAIN_SECONDS: Final = 60.0
EVENTS_AT_ONCE: Final = 10
EVENT_SECONDS: Final = 30.0
"""After EVENTS_AT_ONCE of them, one event in so long for each service."""

KEY_STATE: Final = "state.json"
KEY_MODE: Final = "mode"
KEY_WOKEN: Final = "woken"
_LONGEST_WAKE: Final = 63


@dataclass
class _Voice:
    """Says whether one more event may be posted."""

    left: float = float(EVENTS_AT_ONCE)
    at: float = 0.0
    withheld: int = 0

    def may_speak(self, now: float) -> bool:
        """Whether it may; one that may not is counted."""
        self.left = min(float(EVENTS_AT_ONCE), self.left + max(0.0, now - self.at) / EVENT_SECONDS)
        self.at = now
        if self.left < 1:
            self.withheld += 1
            return False
        self.left -= 1
        return True


@dataclass
class _Track:
    """What is remembered of one service while this process leads."""

    mode: Mode
    history: History
    woken: str
    """Value of the wake annotation that was acted upon."""
    save_at: float
    saved: tuple[bool, str]
    """Panic, and wake-up, as they were written last."""
    report: Report | None = None
    blind_since: float | None = None
    short_at: float | None = None
    """When maxReplicas held it back last."""
    counts: Counts = field(default_factory=Counts)
    voice: _Voice = field(default_factory=_Voice)


@dataclass(frozen=True)
class _Outcome:
    """A decision, and what it was made from."""

    snapshot: Snapshot
    track: _Track
    signals: Signals
    decision: Decision
    acts: bool
    """Whether the figure counts: policy Native, and nobody else scales."""
    blind: bool
    """Whether signals have been missing for a while."""
    now: float


class Autoscaler:
    """Decides on the services whose spec asks for it."""

    def __init__(
        self,
        *,
        store: Store,
        cluster: Cluster,
        read: Callable[[str], Awaitable[None]],
        leading: Callable[[], bool],
        enqueue: Callable[[str], None],
        tuning: Tuning | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``read`` brings the readings of a service's pods up to date; ``clock``: seconds since the epoch."""
        self._store = store
        self._cluster = cluster
        self._read = read
        self._leading = leading
        self._enqueue = enqueue
        self._tuning = tuning or Tuning()
        self._clock = clock
        self._images = view.Images()
        self._tracks: dict[str, _Track] = {}
        self._due: dict[str, float] = {}
        self._asks: dict[str, tuple[int, str]] = {}
        """Generation, and value of the wake annotation, at the last round: another one makes the next due at once."""
        self._working: set[str] = set()

    def reports(self) -> Iterator[Report]:
        """The last decision on each service."""
        return (track.report for track in self._tracks.values() if track.report is not None)

    async def run(self) -> None:
        """Decide until cancelled."""
        async with asyncio.TaskGroup() as rounds:
            while True:
                if self._leading() and self._store.complete:
                    for uid, wait in self._take_due():
                        rounds.create_task(self._round(uid, wait))
                else:
                    for uid in list(self._tracks):
                        self._forget(uid)
                await asyncio.sleep(LOOK_SECONDS)

    def _take_due(self) -> list[tuple[str, float]]:
        """Services whose turn comes before the next look, and the seconds until then."""
        now = asyncio.get_running_loop().time()
        due, there = [], set()
        for service in self._store.llmservices():
            if not decides(service["spec"]):
                continue
            uid = service["metadata"]["uid"]
            there.add(uid)
            metadata = service["metadata"]
            asks = (metadata["generation"], _wake(metadata.get("annotations") or {}))
            at = self._due.get(uid, now) if asks == self._asks.get(uid) else now
            if uid not in self._working and at < now + LOOK_SECONDS:
                self._working.add(uid)
                self._due[uid] = now + QUIET_SECONDS  # unless the decision says otherwise
                self._asks[uid] = asks
                due.append((uid, max(0.0, at - now)))
        for uid in self._due.keys() - there:
            self._forget(uid)
        return due

    def _forget(self, uid: str) -> None:
        self._tracks.pop(uid, None)
        self._due.pop(uid, None)
        self._asks.pop(uid, None)
        self._store.scale(uid, None)

    async def _round(self, uid: str, wait: float) -> None:
        """Wait so many seconds; read, decide, tell. What goes wrong with one service is tried again, and stops no other."""
        try:
            await asyncio.sleep(wait)
            started = asyncio.get_running_loop().time()
            await self._read(uid)
            if not self._leading():
                return
            outcome = self._decide(uid)
            if outcome is None:
                return
            metrics.AUTOSCALER_ROUND_SECONDS.observe(asyncio.get_running_loop().time() - started)
            self._due[uid] = started + self._pause(outcome)
            await self._tell(outcome)
            await self._save(outcome)
        except Exception:
            metrics.AUTOSCALER_ERRORS.inc()
            logger.exception("The autoscaler cannot decide on %s; it is tried again.", uid)
        finally:
            self._working.discard(uid)

    def _decide(self, uid: str) -> _Outcome | None:
        """The decision on a service, kept where it counts; None where there is nothing to decide on."""
        snapshot = self._store.snapshot(uid)
        if snapshot is None or snapshot.deleting or not decides(snapshot.spec):
            return None
        try:
            spec = LLMServiceSpec.parse(dict(snapshot.spec))
        except ValidationError:
            return None  # the condition Accepted says so
        if spec.autoscaling is None:
            return None
        mode, now = choose(spec).mode, self._clock()
        if snapshot.status.get("mode") == other(mode):
            # Clients are led to the other pool as yet: that this one is idle says nothing of demand.
            self._tracks.pop(uid, None)
            self._store.scale(uid, None)
            return None
        track = self._tracks.get(uid)
        if track is None or track.mode != mode:
            track = self._tracks[uid] = self._resumed(snapshot, mode, now=now)
        asked, wake = with_replicas(snapshot, spec).replicas, _wake(snapshot.annotations)
        self._images.note(snapshot.pods)
        signals = view.signals(
            snapshot,
            mode,
            asked=asked,
            wake=wake not in ("", track.woken),
            cached=self._images.cached,
            now=now,
        )
        settings = view.settings(spec.autoscaling, self._tuning)
        with metrics.AUTOSCALER_DECISION_SECONDS.time():
            decision = decide(signals, track.history, settings, now)

        acts = native(spec) and not followed(snapshot, mode)
        last = track.report.decision.desired if track.report is not None else decision.desired
        track.counts.note(decision.reason, decision.desired - (asked if acts else last))
        track.history = decision.history
        if asked or decision.desired:
            track.woken = wake
        track.report = Report(snapshot.namespace, snapshot.name, settings, signals, decision, now, track.counts)
        scaling = Scaling(
            mode=mode,
            desired=decision.desired if acts else asked,
            blind=_blind(track, decision, now),
            at_maximum=_at_maximum(track, decision, now),
        )
        if self._store.scale(uid, scaling):
            self._enqueue(uid)
        return _Outcome(snapshot, track, signals, decision, acts, bool(scaling.blind), now)

    def _resumed(self, snapshot: Snapshot, mode: Mode, *, now: float) -> _Track:
        """The service as another leader, or this process before it was restarted, left it."""
        held = snapshot.children.get(state_ref(snapshot.name), {})
        data = held.get("data") or {}
        known = data.get(KEY_MODE) == mode
        history = document.load(data.get(KEY_STATE), self._tuning) if known else fresh(self._tuning)
        woken = str(data.get(KEY_WOKEN, ""))
        return _Track(
            mode=mode,
            history=history,
            woken=woken,
            save_at=now + first_save_seconds(snapshot.uid),
            saved=(history.panic.until is not None, woken),
        )

    def _pause(self, outcome: _Outcome) -> float:
        """From one round to the next. The first is cut at random, so that services found together are not read together for
        ever."""
        longest = (self._tuning.tick_seconds if _busy(outcome) else QUIET_SECONDS) - MARGIN_SECONDS
        first = outcome.track.counts.decisions.total() == 1
        return longest * (random.uniform(0.3, 1.0) if first else random.uniform(0.95, 1.0))  # noqa: S311

    async def _tell(self, outcome: _Outcome) -> None:
        """One sentence for each change, and not too many of them."""
        snapshot, track, decision = outcome.snapshot, outcome.track, outcome.decision
        if not outcome.acts or decision.desired == outcome.signals.asked or not track.voice.may_speak(outcome.now):
            return
        more = f" {track.voice.withheld} events before this one were left out." if track.voice.withheld else ""
        track.voice.withheld = 0
        short = decision.reason in (Reason.AT_MAXIMUM, Reason.TO_MAXIMUM)
        event = event_of(snapshot, "Warning" if short else "Normal", decision.reason.value, decision.message + more)
        try:
            await self._cluster.create_event(snapshot.namespace, event)
        except (ApiError, NotLeadingError) as error:
            logger.info("An event was not posted: %s", error)

    async def _save(self, outcome: _Outcome) -> None:
        """Keep what was learned, every few minutes, and at once what a restart must not lose."""
        snapshot, track, now = outcome.snapshot, outcome.track, outcome.now
        state = (track.history.panic.until is not None, track.woken)
        if now < track.save_at and state == track.saved:
            return
        track.saved = state
        ref = state_ref(snapshot.name)
        held = snapshot.children.get(ref)
        data = {KEY_STATE: document.dump(track.history), KEY_MODE: track.mode, KEY_WOKEN: track.woken}
        wanted = finished([manifest(Kind.CONFIG_MAP, ref.name, data=data)], snapshot)[ref]
        uid = held["metadata"]["uid"] if held else None
        try:
            self._store.put(ref.kind.value, await self._cluster.apply(snapshot.namespace, ref, wanted, uid=uid))
        except (ApiError, NotLeadingError) as error:
            metrics.AUTOSCALER_STATE_WRITES.labels("failed").inc()
            track.save_at = now + SAVE_AGAIN_SECONDS
            logger.info("What was learned of %s/%s was not kept: %s", snapshot.namespace, snapshot.name, error)
        else:
            metrics.AUTOSCALER_STATE_WRITES.labels("written").inc()
            track.save_at = now + SAVE_SECONDS


def first_save_seconds(uid: str) -> float:
    """Until a service's first write, anywhere within SAVE_SECONDS: services that are found together are not written together."""
    return SAVE_SECONDS * zlib.crc32(uid.encode()) / 2**32


def _wake(annotations: Mapping[str, str]) -> str:
    return str(annotations.get(names.ANNOTATION_WAKE, ""))[:_LONGEST_WAKE]


def _busy(outcome: _Outcome) -> bool:
    """Whether there is work, or was since the last look; a change under way; or something missing that may be back with the next
    poll."""
    decision, signals = outcome.decision, outcome.signals
    if decision.panic or signals.pending or decision.desired != signals.asked:
        return True
    if signals.unread and not outcome.blind:
        return True
    meters = decision.history.meters
    for replica in signals.ready:
        reading, meter = replica.reading, meters.get(replica.name)
        if reading is not None and (reading.running or reading.queued):
            return True
        if meter is not None and (meter.rates.admitted or meter.rates.refused):
            return True
    return False


def _blind(track: _Track, decision: Decision, now: float) -> str:
    """Why nothing goes down; empty unless that has lasted for a while."""
    if decision.active:
        track.blind_since = None
        return ""
    if track.blind_since is None:
        track.blind_since = now
    if now - track.blind_since < BLIND_SECONDS:
        return ""
    return f"Signals of {few(decision.unread)} are missing, so nothing goes down; what the others tell may still raise."


def _at_maximum(track: _Track, decision: Decision, now: float) -> bool:
    if decision.reason is Reason.AT_MAXIMUM:
        track.short_at = now
    return track.short_at is not None and abs(now - track.short_at) < MAXIMUM_SECONDS
