"""Goals and whether a request met them: what goodput counts. Pure.

The goals come from the engine itself, before any policy runs: 5 x the time to the first token and 2 x the time per
output token of an idle engine, for each mix. A request is good if it is complete and met both; one that was refused,
or not complete when nothing could save it any more, is not. Goodput is the share of all that were offered.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from bench import report

TTFT_FACTOR = 5.0
TPOT_FACTOR = 2.0


class End(StrEnum):
    """How a request ended."""

    COMPLETE = "complete"
    REFUSED = "refused"
    """By the policy or the engine: 429, 503, or not sent."""
    UNFINISHED = "unfinished"
    """Still waiting or streaming when it could not meet its goals any more and the run was over."""
    FAILED = "failed"
    """Anything else; a run with such a request is an error, not a measurement."""


@dataclass(frozen=True)
class Outcome:
    """What became of one request; times are seconds from its arrival."""

    end: End
    first_token: float | None = None
    last_token: float | None = None
    tokens: int = 0

    @property
    def tpot(self) -> float | None:
        """Mean time between two output tokens; None where there were less than two."""
        if self.first_token is None or self.last_token is None or self.tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.tokens - 1)


@dataclass(frozen=True)
class Goals:
    """What was promised."""

    ttft_seconds: float
    tpot_seconds: float

    def met(self, outcome: Outcome) -> bool:
        if outcome.end is not End.COMPLETE or outcome.first_token is None:
            return False
        return outcome.first_token <= self.ttft_seconds and (outcome.tpot or 0.0) <= self.tpot_seconds

    def out_of_reach(self, *, age: float, first_token: float | None, output_tokens: int) -> bool:
        """Whether a request that is not complete can no longer meet them; times in seconds from its arrival."""
        if first_token is None:
            return age > self.ttft_seconds
        return first_token > self.ttft_seconds or age - first_token > (output_tokens - 1) * self.tpot_seconds


def goals(unloaded: Sequence[Outcome]) -> Goals:
    """From requests that had the engine for themselves; raises ValueError where none was complete."""
    complete = [outcome for outcome in unloaded if outcome.end is End.COMPLETE]
    ttft = [outcome.first_token for outcome in complete if outcome.first_token is not None]
    tpot = [outcome.tpot for outcome in complete if outcome.tpot is not None]
    if not ttft or not tpot:
        raise ValueError("No request was completed by the idle engine: there is nothing to derive goals from.")
    return Goals(ttft_seconds=TTFT_FACTOR * statistics.median(ttft), tpot_seconds=TPOT_FACTOR * statistics.median(tpot))


def write(goals_: Mapping[str, Goals], path: Path) -> None:
    """One JSON file for all mixes; it never changes once it is there."""
    path.write_text(json.dumps({mix: asdict(each) for mix, each in goals_.items()}, indent=1) + "\n")


def read(path: Path) -> dict[str, Goals]:
    return {mix: Goals(**each) for mix, each in json.loads(path.read_text()).items()}


@dataclass(frozen=True)
class Summary:
    """Requests of one run in figures; times in seconds, None where no request has one."""

    offered: int
    good: int
    refused: int
    unfinished: int
    ttft_median: float | None
    ttft_p99: float | None
    tpot_median: float | None
    tpot_p99: float | None

    @property
    def goodput(self) -> float:
        """Share of the offered requests that met their goals."""
        return self.good / self.offered


def summary(outcomes: Sequence[Outcome], goals_: Goals) -> Summary:
    """Raises ValueError where nothing was offered, or where a request failed for no reason that a policy has."""
    if not outcomes:
        raise ValueError("No request was offered: the run was too short for its rate.")
    failed = sum(outcome.end is End.FAILED for outcome in outcomes)
    if failed:
        raise ValueError(
            f"{failed} of {len(outcomes)} requests failed: the engine or the sidecar is at fault, see its log."
        )
    ttft = [outcome.first_token for outcome in outcomes if outcome.first_token is not None]
    tpot = [outcome.tpot for outcome in outcomes if outcome.tpot is not None]
    return Summary(
        offered=len(outcomes),
        good=sum(goals_.met(outcome) for outcome in outcomes),
        refused=sum(outcome.end is End.REFUSED for outcome in outcomes),
        unfinished=sum(outcome.end is End.UNFINISHED for outcome in outcomes),
        ttft_median=statistics.median(ttft) if ttft else None,
        ttft_p99=report.percentile(ttft, 0.99) if ttft else None,
        tpot_median=statistics.median(tpot) if tpot else None,
        tpot_p99=report.percentile(tpot, 0.99) if tpot else None,
    )
