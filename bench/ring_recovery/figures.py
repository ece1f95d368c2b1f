"""From what was measured to the table and the last line. Pure."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bench import report
from bench.report import Value

_n: Final = report.number


@dataclass(frozen=True)
class Fault:
    """One kill of a rank other than 0; seconds from the kill."""

    next_token_seconds: float
    """Until the client had a token that it kept: of the same stream, or of the one that it asked for again."""
    whole_seconds: float
    """Until all ranks were Ready."""
    recomputed_times_n: float
    """Tokens computed again, as a multiple of one rank's share; nan where it is not known."""
    pods_recreated: int
    went_on: bool
    """The stream went on; else it was cut, and the client asked again."""
    equal: bool
    """The answer is that of the unsharded model."""


@dataclass(frozen=True)
class Rank0:
    """One kill of rank 0; seconds from the kill."""

    next_token_seconds: float
    """Until the first token of the request that was sent again."""
    started_seconds: float
    """Until rank 0 was Ready: its restart, its load, and the ring."""
    recomputed_times_n: float
    equal: bool


@dataclass(frozen=True)
class Results:
    """All of a run."""

    ranks: int
    peer: str
    ours: Sequence[Fault]
    rank_0: Sequence[Rank0]
    theirs: Sequence[Fault]

    @property
    def tokens_equal(self) -> bool:
        """Of every answer, of both."""
        every: Sequence[Fault | Rank0] = [*self.ours, *self.rank_0, *self.theirs]
        return all(answer.equal for answer in every)

    def header(self) -> tuple[str, ...]:
        return ("", "kvplane", self.peer)

    def rows(self) -> list[tuple[str, ...]]:
        """Label, ours, theirs."""
        ours, theirs = self.ours, self.theirs
        all_ours: Sequence[Fault | Rank0] = [*ours, *self.rank_0]

        def both(label: str, of: str) -> tuple[str, ...]:
            return (label, *(spread([getattr(fault, of) for fault in faults]) for faults in (ours, theirs)))

        return [
            both(f"kill -9 of a rank of {self.ranks} → next token, s", "next_token_seconds"),
            ("… streams that went on", *(_share(faults) for faults in (ours, theirs))),
            both("… all ranks Ready again, s", "whole_seconds"),
            both("… tokens computed again, x N", "recomputed_times_n"),
            (
                "… pods made anew",
                *(f"{max(f.pods_recreated for f in faults)} of {self.ranks}" for faults in (ours, theirs)),
            ),
            (
                "kill -9 of rank 0 → first token, asked again, s",
                spread([f.next_token_seconds for f in self.rank_0]),
                "",
            ),
            ("… of that, until rank 0 was Ready, s", spread([f.started_seconds for f in self.rank_0]), ""),
            ("… tokens computed again, x N", spread([f.recomputed_times_n for f in self.rank_0]), ""),
            ("answers equal to the unsharded model's", _equal(all_ours), _equal(theirs)),
        ]

    def last_line(self) -> dict[str, Value]:
        """Medians; of pods the most."""
        return {
            "next_token_s": statistics.median(fault.next_token_seconds for fault in self.ours),
            "rank0_next_token_s": statistics.median(fault.next_token_seconds for fault in self.rank_0),
            "back_to_n_s": statistics.median(fault.whole_seconds for fault in self.ours),
            "recomputed_share_times_n": statistics.median(fault.recomputed_times_n for fault in self.ours),
            "tokens_equal": "yes" if self.tokens_equal else "no",
            "pods_recreated": max(fault.pods_recreated for fault in self.ours),
            "lws_next_token_s": statistics.median(fault.next_token_seconds for fault in self.theirs),
            "lws_pods_recreated": max(fault.pods_recreated for fault in self.theirs),
        }


def spread(values: Sequence[float]) -> str:
    """Median, and where there are several the smallest and the largest; of those that are known."""
    known = [float(value) for value in values if not math.isnan(value)]
    if not known:
        return "none"
    median = _n(statistics.median(known))
    return median if len(known) == 1 else f"{median} ({_n(min(known))} to {_n(max(known))})"


def _share(faults: Sequence[Fault]) -> str:
    return f"{sum(fault.went_on for fault in faults)} of {len(faults)}"


def _equal(faults: Sequence[Fault | Rank0]) -> str:
    return f"{sum(fault.equal for fault in faults)} of {len(faults)}"
