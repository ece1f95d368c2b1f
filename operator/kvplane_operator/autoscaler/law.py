"""The law: how many replicas a service should have now, and why.

Up by jumps: to what the demand of now, or of the time when a new replica would serve, needs; what is on its way counts by
its chance to be there in time and never locks. At most +100 % or four in 15 s, unless there is a panic.

Down only if all of a list of checks agree, and only as far as the demand of a whole window fits into 0.7 of what stays.

Zero after a time without requests, and back for the first one.

Blind is static: where one replica's signals are missing, what the others tell may still raise, and nothing lowers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from kvplane_operator.autoscaler import panic as panics
from kvplane_operator.autoscaler.demand import Demand, measure, shed_share
from kvplane_operator.autoscaler.flows import Meter, metered
from kvplane_operator.autoscaler.forecast import Forecast, Method, look_ahead
from kvplane_operator.autoscaler.history import GAP_SECONDS, History, resumed
from kvplane_operator.autoscaler.hold import worth_keeping
from kvplane_operator.autoscaler.learned import learn
from kvplane_operator.autoscaler.series import REMEMBERED_SECONDS
from kvplane_operator.autoscaler.settings import Settings
from kvplane_operator.autoscaler.signals import Signals
from kvplane_operator.autoscaler.startup import StartTimes

_ROUNDING: Final = 1e-9
_ASKED_MOST: Final = 32
_REFUSED_COUNTED_SECONDS: Final = 600.0
"""Of the time for which a replica was refused, what counts as its start: a node that is added for it takes minutes."""
_REPLACED: Final = 2
"""Times the replicas needed: up to so many are asked for while those that were asked for before do not come."""


class Reason(StrEnum):
    """Why a decision is what it is."""

    UP = "ScaledUp"
    """Demand, now or as forecast, needs more."""
    UP_LIMITED = "ScaledUpAsFarAsAllowed"
    """It needs more than may be added at once; the rest follows."""
    AT_MAXIMUM = "AtMaximum"
    """It needs more than maxReplicas."""
    TO_MINIMUM = "RaisedToMinimum"
    """Fewer are asked for than minReplicas."""
    TO_MAXIMUM = "LoweredToMaximum"
    """More are asked for than maxReplicas."""
    DOWN = "ScaledDown"
    """The demand of the whole window fits into fewer."""
    STEADY = "Steady"
    """Neither more nor fewer are needed."""
    BLIND = "SignalsMissing"
    """Signals are missing, so nothing goes down."""
    PANIC = "Overloaded"
    """An overload is seen or was a moment ago, so nothing goes down."""
    SETTLING = "NotWatchedLongEnough"
    """All signals were not there for a whole window yet."""
    HELD = "KeptForBursts"
    """A burst is likely to come back before a new replica could serve."""
    LATE = "ReplicasLate"
    """Replicas that demand needs take longer to start than they should, so nothing goes down."""
    GLIDING = "GlidingDown"
    """What an overload brought goes in a line."""
    TO_ZERO = "ScaledToZero"
    """Nobody has asked for long enough."""
    ASLEEP = "Asleep"
    """Nothing runs, and nobody asks."""
    WOKEN = "Woken"
    """Somebody asks for a service that had nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do, why, and what to remember."""

    desired: int
    reason: Reason
    message: str
    """One sentence with the numbers, for an event."""
    demand: Demand
    forecast: Forecast
    horizon_seconds: float
    """Until a replica that is asked for now would serve."""
    panic: bool
    unread: tuple[str, ...]
    """Replicas that serve and whose signals are missing."""
    active: bool
    """ScalingActive: whether replicas can go both ways as far as signals are concerned."""
    history: History


@dataclass(frozen=True, slots=True, kw_only=True)
class _Situation:
    """What the checks look at."""

    signals: Signals
    settings: Settings
    now: float
    history: History
    """With what this decision has seen."""
    demand: Demand
    forecast: Forecast
    horizon: float
    needed: float
    """The highest of the demand of now with its noise, and the forecast."""
    coming: float
    """Replicas asked for that are ready, or will be when one asked for now would be."""
    complete: bool
    """Whether there are signals, and all."""
    overload: str | None
    began_at: float

    @property
    def asked(self) -> int:
        return self.signals.asked

    @property
    def target(self) -> int:
        return math.ceil(self.needed - _ROUNDING)

    @property
    def in_panic(self) -> bool:
        return self.history.panic.until is not None

    @property
    def window(self) -> float:
        """Of two starts or more, and no longer than demand is remembered."""
        return max(float(self.settings.scale_down_window_seconds), min(2 * self.horizon, REMEMBERED_SECONDS))


@dataclass(frozen=True, slots=True)
class _Verdict:
    desired: int
    reason: Reason
    why: str
    """Ends the sentence."""
    panic: panics.Panic


def decide(signals: Signals, history: History, settings: Settings, now: float) -> Decision:
    """The decision for these signals; ``now`` in seconds since the epoch."""
    situation = _look(signals, resumed(history, now=now), settings, now)
    verdict = _bounded(_rule(situation), situation)
    seen = situation.history
    asked = (*(each for each in seen.asked if each[0] > now - settings.tuning.step_seconds), (now, verdict.desired))
    return Decision(
        desired=verdict.desired,
        reason=verdict.reason,
        message=_sentence(situation, verdict),
        demand=situation.demand,
        forecast=situation.forecast,
        horizon_seconds=situation.horizon,
        panic=situation.in_panic,
        unread=signals.unread,
        active=situation.complete or not signals.ready,
        history=replace(seen, panic=verdict.panic, asked=asked[-_ASKED_MOST:]),
    )


# What is there.


def _look(signals: Signals, history: History, settings: Settings, now: float) -> _Situation:
    """The situation. What was learned, and the noise, are as of the last decision: see the test on monotony."""
    tuning = settings.tuning
    meters = metered(history.meters, signals.ready)
    demand = measure(signals, meters, history.learned, settings)
    complete = bool(signals.ready) and not signals.unread
    seconds = 0.0 if history.decided_at is None else min(max(0.0, now - history.decided_at), GAP_SECONDS)
    starts, known = _starts(signals, history, now)
    # Nobody knows to which node the next replica will go, and whether that one has the image: of all starts.
    horizon = starts.p90(None, unknown=tuning.unknown_startup_seconds) + tuning.tick_seconds
    series, outlook = history.series, history.outlook
    forecast = Forecast(demand.total, Method.PERSISTENCE)
    noise = 0.0
    watched_since, watched_at = history.watched_since, history.watched_at
    if complete:
        if not history.learned.room.choices:
            noise = series.noise(now=now)
        series = series.noted(demand.total, now=now)
        forecast, outlook = look_ahead(
            outlook, series, demand.total, horizon=horizon, quantile=tuning.forecast_quantile, now=now
        )
        if watched_since is None or watched_at is None or now - watched_at > GAP_SECONDS:
            watched_since = now
        watched_at = now
    coming = _coming(signals, starts, horizon=horizon, now=now)
    overload = panics.overload(
        panics.Load(
            demand=demand.total,
            ready=len(signals.ready),
            coming=coming,
            forecast=forecast.demand,
            reach=_reach(signals, history.learned.usable.share),
            shed_share=shed_share(meters),
            waste=demand.waste,
        ),
        tuning,
    )
    panic = panics.renewed(
        history.panic,
        seen=overload is not None,
        lasts_seconds=max(tuning.panic_seconds, horizon),
        now=now,
        tuning=tuning,
    )
    return _Situation(
        signals=signals,
        settings=settings,
        now=now,
        history=replace(
            history,
            learned=learn(
                history.learned,
                signals=signals,
                meters=meters,
                # Up to down_share one replica is enough, whatever is known of it.
                prompts_lead=(demand.prefill or 0.0) > max(demand.kv, tuning.down_share),
                seconds=seconds,
                now=now,
                tuning=tuning,
            ),
            starts=starts,
            series=series,
            outlook=outlook,
            panic=panic,
            idle_since=_idle_since(signals, meters, history.idle_since, now=now),
            decided_at=now,
            watched_since=watched_since,
            watched_at=watched_at,
            meters=meters,
            known=known,
            refused={
                replica.name: history.refused.get(replica.name, 0.0) + (seconds if replica.refused else 0.0)
                for replica in signals.pending
                if replica.refused or replica.name in history.refused
            },
        ),
        demand=demand,
        forecast=forecast,
        horizon=horizon,
        needed=max(demand.total + tuning.noise_deviations * noise, forecast.demand),
        coming=coming,
        complete=complete,
        overload=overload,
        began_at=now if history.began_at is None else history.began_at,
    )


def _starts(signals: Signals, history: History, now: float) -> tuple[StartTimes, frozenset[str]]:
    """The start times with those of replicas that are ready for the first time; and the replicas that have been.

    Where nobody has looked before, one that is no longer young may have served already, and only falter. Hours in which no
    node took a replica are none of its start, but the minutes in which a node is added are.
    """
    starts = history.starts
    ready = frozenset(replica.name for replica in signals.ready)
    if history.known is None:
        return starts, ready | {each.name for each in signals.replicas if now - each.created_at > GAP_SECONDS}
    for replica in signals.ready:
        if replica.name not in history.known:
            waited = max(0.0, history.refused.get(replica.name, 0.0) - _REFUSED_COUNTED_SECONDS)
            starts = starts.noted(now - replica.created_at - waited, image_cached=replica.image_cached)
    there = frozenset(replica.name for replica in signals.replicas)
    return starts, ready | (history.known & there)


def _coming(signals: Signals, starts: StartTimes, *, horizon: float, now: float) -> float:
    """Ready, and each other one asked for by its chance to be ready within the horizon; never more than asked for.

    One that is refused counts as if it came: to ask for another would not help.
    """

    def chance(age: float, image_cached: bool | None) -> float:
        return starts.chance(max(0.0, age), within=horizon, image_cached=image_cached)

    coming = float(len(signals.ready))
    for replica in signals.pending:
        began = max(replica.created_at, replica.changed_at or replica.created_at)
        coming += 1.0 if replica.refused else chance(now - began, replica.image_cached)
    unborn = max(0, signals.asked - len(signals.ready) - len(signals.pending))
    return min(float(signals.asked), coming + unborn * chance(0.0, None))


def _reach(signals: Signals, share: float) -> float:
    kappas = [replica.reading.kappa for replica in signals.ready if replica.reading is not None]
    return sum(max(1.0, kappa / share) for kappa in kappas) / len(kappas) if kappas else 1.0


def _idle_since(signals: Signals, meters: Mapping[str, Meter], since: float | None, *, now: float) -> float | None:
    """Since when nothing was there; as before while a new replica's rates cannot be told."""
    if signals.wake or not signals.ready:
        return None
    told = True
    for replica in signals.ready:
        reading, meter = replica.reading, meters.get(replica.name)
        if reading is None or meter is None or reading.running or reading.queued:
            return None
        rates = meter.rates
        events = (rates.admitted, rates.refused, rates.prompt_tokens, rates.generation_tokens)
        if any(events):
            return None
        told = told and any(event is not None for event in events)
    if not told:
        return since
    return now if since is None else min(since, now)


# What follows.


def _rule(s: _Situation) -> _Verdict:
    """The first of the rules that has something to say."""
    rules: tuple[Callable[[_Situation], _Verdict | None], ...] = (_sleep, _wake, _zero, _up, _down)
    return next(verdict for rule in rules if (verdict := rule(s)) is not None)


def _sleep(s: _Situation) -> _Verdict | None:
    """Nothing runs, as nobody asks."""
    if s.asked or s.settings.scale_to_zero_after_seconds is None or s.signals.wake or s.demand.total > 0:
        return None
    return _Verdict(0, Reason.ASLEEP, "nobody asks", s.history.panic)


def _wake(s: _Situation) -> _Verdict | None:
    if s.asked or not s.signals.wake:
        return None
    return _Verdict(s.settings.min_replicas, Reason.WOKEN, "a request waits for it", s.history.panic)


def _zero(s: _Situation) -> _Verdict | None:
    """Down to nothing; after a restart not before a window, as with every way down.

    What starts keeps the service, as somebody may wait for it; what is refused would keep it for ever.
    """
    after, since = s.settings.scale_to_zero_after_seconds, s.history.idle_since
    starting = any(not replica.refused for replica in s.signals.pending)
    if after is None or since is None or not s.asked or not s.complete or starting or s.in_panic:
        return None
    if s.now - since < after or s.now - s.began_at < s.settings.scale_down_window_seconds:
        return None
    return _Verdict(0, Reason.TO_ZERO, f"no request came for {s.now - since:.0f} s", panics.Panic())


def _up(s: _Situation) -> _Verdict | None:
    """More replicas; None where demand needs no more than what is asked for."""
    lowest, highest = s.settings.min_replicas, s.settings.max_replicas
    missing = max(0, math.floor(s.target - s.coming + 0.5))
    # In place of those that do not come as many again as are needed, and no more: what ails them may ail every one.
    wanted = max(s.asked, min(s.asked + missing, _REPLACED * s.target))
    allowed = wanted if s.in_panic else max(s.asked, min(wanted, _step(s)))
    desired = min(max(allowed, lowest), highest)
    if desired <= s.asked and wanted <= s.asked:
        return None
    panic = panics.raised(s.history.panic, desired=max(desired, min(s.asked, highest)))
    if wanted > highest and desired == highest:
        why = f"maxReplicas is {highest} and {wanted} would be needed"
        return _Verdict(highest, Reason.AT_MAXIMUM, why, panic)
    if allowed < lowest:
        return _Verdict(desired, Reason.TO_MINIMUM, f"minReplicas is {lowest}", panic)
    if allowed < wanted:
        seconds = s.settings.tuning.step_seconds
        why = f"{wanted} are needed, and no more may be added within {seconds:.0f} s"
        return _Verdict(desired, Reason.UP_LIMITED, why, panic)
    why = s.overload or "demand needs more"
    return _Verdict(desired, Reason.UP, why, panic)


def _step(s: _Situation) -> int:
    """How many there may be now, after what was there a step ago."""
    tuning = s.settings.tuning
    recent = [replicas for at, replicas in s.history.asked if at > s.now - tuning.step_seconds]
    base = min([s.asked, *recent])
    return max(2 * base, base + tuning.step_replicas)


def _down(s: _Situation) -> _Verdict:
    """Fewer replicas, or the first objection to that."""
    panic = s.history.panic
    kept = panics.raised(panic, desired=s.asked)
    checks: tuple[Callable[[_Situation], tuple[Reason, str] | None], ...] = (_blind, _panicking, _settling)
    for check in checks:
        if (objection := check(s)) is not None:
            # What is not seen is no need: replicas that go in a line go on where they were.
            return _Verdict(s.asked, *objection, kept if s.in_panic else panic)
    highest = max(s.history.series.highest(since=s.now - s.window), s.needed)
    if _late(s, highest):
        why = f"{highest:.2f} were needed within {s.window:.0f} s, and not all that were asked for are there in time"
        return _Verdict(s.asked, Reason.LATE, why, kept)
    share = s.settings.tuning.down_share
    low = max(math.ceil(highest / share - _ROUNDING), s.target, s.settings.min_replicas)
    if low >= s.asked:
        why = f"{highest:.2f} were needed within {s.window:.0f} s, which must fit into {share:g} of what stays"
        return _Verdict(s.asked, Reason.STEADY, why, kept)
    worth = worth_keeping(
        s.history.series, low=low, asked=s.asked, cost_of_miss=s.settings.cost_of_miss, within_seconds=s.horizon
    )
    if worth >= s.asked:
        why = f"a burst that needs more than {low} is likely to come back within the {s.horizon:.0f} s of a start"
        return _Verdict(s.asked, Reason.HELD, why, kept)
    reached, panic = panics.lowered(panic, asked=s.asked, low=worth, lasts_seconds=s.window, now=s.now)
    if reached > worth:
        return _Verdict(reached, Reason.GLIDING, f"they go in a line to {worth} after an overload", panic)
    return _Verdict(reached, Reason.DOWN, f"at most {highest:.2f} were needed within {s.window:.0f} s", panic)


def _blind(s: _Situation) -> tuple[Reason, str] | None:
    if s.complete:
        return None
    unread = s.signals.unread
    if not unread:
        return Reason.BLIND, "none serves yet, so nothing tells of demand"
    return Reason.BLIND, f"signals of {few(unread)} are missing, so nothing goes down"


def few(names: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _panicking(s: _Situation) -> tuple[Reason, str] | None:
    if not s.in_panic:
        return None
    return Reason.PANIC, s.overload or "an overload was seen less than a start ago"


def _settling(s: _Situation) -> tuple[Reason, str] | None:
    since = s.history.watched_since
    watched = 0.0 if since is None else s.now - since
    if watched >= s.window:
        return None
    return Reason.SETTLING, f"signals were watched for {watched:.0f} of the {s.window:.0f} s before anything goes down"


def _late(s: _Situation, highest: float) -> bool:
    """Whether what serves is too little while others do not come: those would be asked for again as soon as they went."""
    return s.asked - s.coming >= 0.5 and math.ceil(highest - _ROUNDING) > len(s.signals.ready)


def _bounded(verdict: _Verdict, s: _Situation) -> _Verdict:
    """Within maxReplicas whatever was said: it is the user's order, and the only one that lowers blindly."""
    highest = s.settings.max_replicas
    if verdict.desired <= highest:
        return verdict
    return replace(verdict, desired=highest, reason=Reason.TO_MAXIMUM, why=f"maxReplicas is {highest}")


def _sentence(s: _Situation, verdict: _Verdict) -> str:
    asked, desired = s.asked, verdict.desired
    moved = f"Stays at {asked}" if asked == desired else f"From {asked} to {desired}"
    ahead = f"in {s.horizon:.0f} s {s.forecast.demand:.2f} ({s.forecast.method})"
    there = f"{len(s.signals.ready)} ready, {len(s.signals.pending)} pending"
    return f"{moved} replicas: {verdict.why}; demand {s.demand}, {ahead}; {there}."
