"""The Azure traces as load: any rate, and as many different runs as there are seeds. Pure but for ``load``.

One trace is one hour of one day, so a seed varies what can be varied without inventing traffic: where in the hour a run
begins (the hour is a circle) and which tenth of the requests is left out. Then all gaps are scaled by one factor to the
rate wanted, so bursts and their lengths in requests stay as they were.

The traces do not say what clients announced as ``max_tokens``; as in ``bench.admission.workload`` it is a round ceiling
that has little to do with the answer, but is never below it.
"""

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from bench.admission.workload import Arrival

FOLDER: Final = Path(__file__).resolve().parents[2] / "traces"
NAMES: Final = ("conv", "code")
KEPT: Final = 0.9
CEILINGS: Final = (256, 512, 1024, 2048)
_CEILING_WEIGHTS: Final = (2, 1, 1, 0)
"""2,048 only where an answer is longer than 1,024."""


@dataclass(frozen=True)
class Line:
    """One line of a trace."""

    at: float
    """Seconds from the first line."""
    prompt_tokens: int
    output_tokens: int


def load(name: str, folder: Path = FOLDER) -> list[Line]:
    """The trace ``conv`` or ``code``, in order of time."""
    with (folder / f"azure23_{name}.csv").open(newline="") as file:
        rows = [
            (_seconds(row["TIMESTAMP"]), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
            for row in csv.DictReader(file)
        ]
    rows.sort(key=lambda row: row[0])
    start = rows[0][0]
    return [Line(at - start, prompt, output) for at, prompt, output in rows]


def arrivals(trace: Sequence[Line], *, rate: float, seed: int, share: float = 1.0) -> list[Arrival]:
    """The requests of one run at ``rate`` requests a second on average.

    ``share``: how much of the trace is used, from where the seed says, 1 for all of it; a search needs less.
    """
    random_ = random.Random(f"trace {seed}")
    length = trace[-1].at
    first = random_.randrange(len(trace))
    count = max(2, round(share * len(trace)))
    window = [trace[(first + i) % len(trace)] for i in range(count)]
    kept = [line for line in window if random_.random() < KEPT]
    times = [line.at + (length if line.at < window[0].at else 0.0) for line in kept]
    scale = (len(kept) / rate) / (times[-1] - times[0]) if times[-1] > times[0] else 0.0
    return [
        Arrival(
            at=(at - times[0]) * scale,
            prompt_tokens=max(1, line.prompt_tokens),
            output_tokens=max(1, line.output_tokens),
            max_tokens=_ceiling(line.output_tokens, random_),
        )
        for at, line in zip(times, kept, strict=True)
    ]


def _ceiling(output: int, random_: random.Random) -> int:
    (drawn,) = random_.choices(CEILINGS, weights=_CEILING_WEIGHTS)
    return max(drawn, next((each for each in CEILINGS if each >= output), output))


def _seconds(timestamp: str) -> float:
    whole, _, fraction = timestamp.partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")
