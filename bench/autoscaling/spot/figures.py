"""From what callers got, and when the cluster changed, to the table and the last line. Pure."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from bench import report
from bench.report import Value
from e2e.tests.client import Answered

HEADER: Final = ("", "kvplane")
_n: Final = report.number


@dataclass(frozen=True)
class Goals:
    """What the service promises, as ``spec.slo``."""

    ttft_seconds: float
    tpot_seconds: float

    def met_by(self, answer: Answered) -> bool:
        """Whether both are; what a refused request waits before it is let in counts."""
        if answer.first - answer.asked > self.ttft_seconds:
            return False
        return answer.tokens < 2 or (answer.ended - answer.first) / (answer.tokens - 1) <= self.tpot_seconds


@dataclass(frozen=True)
class Spell:
    """What the callers of the step got in a part of it."""

    seconds: float
    answers: int
    good: int
    """Of these, those that met the goals."""
    first_token_seconds: float
    """Median; nan without an answer."""

    @property
    def goodput(self) -> float:
        """Good answers a second."""
        return self.good / self.seconds


def spell(answers: Iterable[Answered], goals: Goals, *, begin: float, end: float) -> Spell:
    """Of the answers that ended between these moments."""
    found = [answer for answer in answers if begin <= answer.ended < end]
    return Spell(
        seconds=end - begin,
        answers=len(found),
        good=sum(goals.met_by(answer) for answer in found),
        first_token_seconds=statistics.median(each.first - each.asked for each in found) if found else math.nan,
    )


@dataclass(frozen=True)
class Results:
    """All of a run."""

    signal_to_ask_seconds: float
    """From the first look that shows too much for one replica to a Deployment of two; 0 where this was seen first."""
    ask_to_ready_seconds: float
    alone: Spell
    """The step on one replica, from when the second was asked for until it was Ready."""
    both: Spell
    """The step on two."""
    back_to_one_seconds: float
    """From the end of the step to a Deployment of one."""
    gone_seconds: float
    """From there until only one pod was left."""
    answers: int
    refusals: int
    lost: Sequence[str]
    """Requests that were cut, or answered with anything but an answer or a refusal; of the whole run."""
    events: Sequence[tuple[str, str]]
    """Reason and message of each of the service."""

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the table."""
        alone, both = self.alone, self.both
        return [
            ("more than one replica's work → second asked for, s", _n(self.signal_to_ask_seconds)),
            ("… → Ready, s", _n(self.ask_to_ready_seconds)),
            ("good answers/s on one replica / on two", f"{_n(alone.goodput)} / {_n(both.goodput)}"),
            ("… good ones of all, on one / on two", f"{alone.good} of {alone.answers} / {both.good} of {both.answers}"),
            (
                "… first token, median, on one / on two, s",
                f"{_n(alone.first_token_seconds)} / {_n(both.first_token_seconds)}",
            ),
            ("end of the step → one asked for, s", _n(self.back_to_one_seconds)),
            ("… → the other pod gone, s", _n(self.gone_seconds)),
            ("answers / refusals / lost", f"{self.answers} / {self.refusals} / {len(self.lost)}"),
        ]

    def last_line(self) -> dict[str, Value]:
        return {
            "signal_to_ask_s": self.signal_to_ask_seconds,
            "ask_to_ready_s": self.ask_to_ready_seconds,
            "goodput_before_per_s": self.alone.goodput,
            "goodput_after_per_s": self.both.goodput,
            "back_to_one_s": self.back_to_one_seconds,
            "lost": len(self.lost),
        }
