"""Precision, recall and delay of the alarm over many trials."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from bench.thrash.trial import HEALTHY, TICK_SECONDS, Episode, Trial


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the alarms of one or more trials compare with the truth."""

    episodes: int
    """Times in which the engine thrashed for a minute or longer."""
    delays: tuple[float, ...]
    """Of those that were told: seconds from the first wasteful ten seconds to the alarm."""
    alarms: int
    false_alarms: int
    """Alarms in a minute without waste."""
    kinds: tuple[str, ...]
    """Of the alarms."""

    @property
    def recall(self) -> float:
        """Share of the episodes that were told; 1 if there were none."""
        return len(self.delays) / self.episodes if self.episodes else 1.0

    @property
    def precision(self) -> float:
        """Share of the alarms that were true; 1 if there were none."""
        return 1 - self.false_alarms / self.alarms if self.alarms else 1.0

    @property
    def delay(self) -> float:
        """Median; NaN if nothing was told."""
        return statistics.median(self.delays) if self.delays else float("nan")


def judge(trial: Trial) -> Verdict:
    """Of one trial. An alarm that was on already when an episode began told it at once."""
    episodes = trial.thrashing()
    delays = [delay for episode in episodes if (delay := _delay(trial, episode)) is not None]
    minutes = trial.minutes()
    false = sum(1 for began, _ in trial.alarms if minutes[round(began / TICK_SECONDS) - 1] < HEALTHY)
    return Verdict(
        episodes=len(episodes),
        delays=tuple(delays),
        alarms=len(trial.alarms),
        false_alarms=false,
        kinds=tuple(kind for _, kind in trial.alarms),
    )


def _delay(trial: Trial, episode: Episode) -> float | None:
    began = [began for began, _ in trial.alarms if episode.began < began <= episode.ended]
    on = any(tick.alarm for tick in trial.ticks if tick.ended == episode.began)
    return 0.0 if on else began[0] - episode.began if began else None


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """Of all trials."""
    found = list(verdicts)
    return Verdict(
        episodes=sum(verdict.episodes for verdict in found),
        delays=tuple(delay for verdict in found for delay in verdict.delays),
        alarms=sum(verdict.alarms for verdict in found),
        false_alarms=sum(verdict.false_alarms for verdict in found),
        kinds=tuple(kind for verdict in found for kind in verdict.kinds),
    )
