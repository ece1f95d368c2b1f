"""Step times of a real engine, fitted: seconds = base + prefill tokens, decodes and context tokens, each at its price.

The steps come from a recorder inside the engine while it serves streams, so what the API server takes of the same CPUs is
in them. Some are not the engine's: one that took INTERRUPTED times as long as the median of its twins, steps with the same
prefill tokens and as many decodes, had lost its processor, whatever the law of step times is. Those are told by their
number and neither fitted on nor judged by.

The others are fitted with Huber's weights (Annals of Mathematical Statistics 35, 1964), since milliseconds that another
process takes now and then are in them still. Errors are relative, as a step of 5 ms matters as much as one of 50, and to the
time that is *predicted*: relative to the one that was measured, a slow step pulls less than a fast one, and all prices come
out too low. MAPE, R^2 and bias are of every other step, which was not fitted on, whatever its error.

A prompt's attention to itself grows with its square and has no price of its own; up to the 900 tokens that are measured it
is part of the price per token. ``ratios`` shows where the law does not hold.
"""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Final

from bench.engine.model import StepTime
from bench.engine.schedule import Step

FITS: Final = Path(__file__).resolve().parent / "fits"
ROUNDS: Final = 30
INTERRUPTED: Final = 3.0
_TWINS: Final = 5
"""Steps alike from which on their median says something."""
_HUBER: Final = 1.345
"""Standard deviations from which on an error counts less: 95 % efficient where errors are normal."""
_DEVIATION: Final = 1.4826
"""Standard deviations of normal errors in a median absolute error."""


@dataclass(frozen=True)
class Fit:
    """The step times of one engine on one machine, and how far they are to be trusted."""

    vllm: str
    machine: str
    date: str
    step_time: StepTime
    frontend_seconds: float
    """From the client's request to the engine core and back, without any step; the median of lone requests."""
    mape_percent: float
    r_squared: float
    bias_percent: float
    interrupted_percent: float
    """As ``Quality``."""
    steps: int

    def write(self, name: str, folder: Path = FITS) -> Path:
        """As ``NAME.json``; its path."""
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.json"
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return path

    @classmethod
    def read(cls, name: str, folder: Path = FITS) -> "Fit":
        """What ``write`` wrote."""
        document = json.loads((folder / f"{name}.json").read_text())
        return cls(**{**document, "step_time": StepTime(**document["step_time"])})


@dataclass(frozen=True)
class Quality:
    """Errors of a fit on steps that it has not seen."""

    mape_percent: float
    """Mean absolute error of a step's time, as a share of the time."""
    r_squared: float
    bias_percent: float
    """By how much the time of all of them is predicted too long; below 0 too short."""
    interrupted_percent: float
    """Of all steps; they are in none of the above."""


def fit_step_time(steps: Sequence[Step]) -> tuple[StepTime, Quality]:
    """Fitted on every other step that has a time and something to do and was not interrupted, judged on the rest.

    Raises:
        ValueError: there are fewer than 20 of them.
    """
    timed = _timed(steps)
    if len(timed) < 20:
        raise ValueError(f"A fit needs at least 20 timed steps, got {len(timed)}: measure for longer.")
    kept = _uninterrupted(timed)
    learned, judged = kept[::2], kept[1::2]
    prices = _least_squares(learned, [1 / step.seconds for step in learned])
    for _ in range(ROUNDS):
        errors = [step.seconds / _predicted(prices, step) - 1 for step in learned]
        bound = _HUBER * max(1e-9, _DEVIATION * statistics.median(map(abs, errors)))
        weights = [math.sqrt(min(1.0, bound / abs(error))) if error else 1.0 for error in errors]
        scales = [weight / _predicted(prices, step) for weight, step in zip(weights, learned, strict=True)]
        prices = _least_squares(learned, scales)
    predicted = [_predicted(prices, step) for step in judged]
    times = [step.seconds for step in judged]
    mean = statistics.fmean(times)
    residual = sum((seconds - told) ** 2 for seconds, told in zip(times, predicted, strict=True))
    quality = Quality(
        mape_percent=100
        * statistics.fmean(abs(told / seconds - 1) for seconds, told in zip(times, predicted, strict=True)),
        r_squared=1 - residual / sum((seconds - mean) ** 2 for seconds in times),
        bias_percent=100 * (sum(predicted) / sum(times) - 1),
        interrupted_percent=100 * (1 - len(kept) / len(timed)),
    )
    return StepTime(*prices), quality


def ratios(steps: Sequence[Step], step_time: StepTime) -> dict[str, tuple[int, float]]:
    """By kind of step: how many were not interrupted, and the median of their predicted over their measured times."""
    prices = _prices(step_time)
    kinds: defaultdict[str, list[float]] = defaultdict(list)
    for step in _uninterrupted(_timed(steps)):
        kinds[_kind(*step.twins)].append(_predicted(prices, step) / step.seconds)
    return {kind: (len(found), statistics.median(found)) for kind, found in sorted(kinds.items())}


def with_interruptions(step_time: StepTime, steps: Sequence[Step]) -> StepTime:
    """The law with a base by which these steps take as long together as they took, interruptions spread over all of them."""
    prices, timed = _prices(step_time), _timed(steps)
    return replace(
        step_time, base=step_time.base + statistics.fmean(step.seconds - _predicted(prices, step) for step in timed)
    )


def _kind(prefill_tokens: int, decodes: int) -> str:
    if prefill_tokens:
        return "prompts, 256 tokens or more" if prefill_tokens >= 256 else "prompts, fewer than 256 tokens"
    if decodes == 1:
        return "1 decode"
    return "2 to 8 decodes" if decodes <= 8 else "more decodes"


@dataclass(frozen=True, slots=True)
class _Timed:
    """One step as the fit sees it."""

    twins: tuple[int, int]
    """Prefill tokens and decodes."""
    work: tuple[float, ...]
    """What has a price."""
    seconds: float

    @classmethod
    def of(cls, step: Step, seconds: float) -> "_Timed":
        prefill, decodes = step.prefill_tokens, step.decodes
        return cls((prefill, decodes), (1.0, float(prefill), float(decodes), float(step.context_tokens)), seconds)


def _timed(steps: Sequence[Step]) -> list[_Timed]:
    return [_Timed.of(step, step.seconds) for step in steps if step.seconds and step.scheduled]


def _prices(step_time: StepTime) -> tuple[float, ...]:
    """In the order of ``_Timed.work``."""
    return step_time.base, step_time.per_prefill_token, step_time.per_decode, step_time.per_context_token


def _uninterrupted(steps: Sequence[_Timed]) -> list[_Timed]:
    alike: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
    for step in steps:
        alike[step.twins].append(step.seconds)
    longest = {
        twins: INTERRUPTED * statistics.median(times) if len(times) >= _TWINS else math.inf
        for twins, times in alike.items()
    }
    return [step for step in steps if step.seconds <= longest[step.twins]]


def _predicted(prices: Sequence[float], step: _Timed) -> float:
    return sum(price * amount for price, amount in zip(prices, step.work, strict=True))


def _least_squares(steps: Sequence[_Timed], scales: Sequence[float]) -> list[float]:
    """Prices of 0 or more that minimise the sum of (scale x (predicted - measured))^2.

    Of every set of prices the normal equations are solved, the others being 0; the best solution without a negative
    price is the minimum. What never happened, or follows from what has a price, has none.
    """
    rows = [[scale * amount for amount in step.work] for step, scale in zip(steps, scales, strict=True)]
    wanted = [scale * step.seconds for step, scale in zip(steps, scales, strict=True)]
    size = len(rows[0])
    largest = [max(row[i] for row in rows) or 1.0 for i in range(size)]
    columns = [[row[i] / largest[i] for row in rows] for i in range(size)]
    matrix = [[_dot(one, other) for other in columns] for one in columns]
    right = [_dot(column, wanted) for column in columns]
    best, gained = [0.0] * size, 0.0
    for count in range(1, size + 1):
        for used in combinations(range(size), count):
            solved = _solve([[matrix[i][j] for j in used] for i in used], [right[i] for i in used])
            if solved is None or min(solved) < 0:
                continue
            # The sum of squares is that of the measured less this.
            gain = sum(right[i] * price for i, price in zip(used, solved, strict=True))
            if gain > gained * (1 + 1e-12):
                gained = gain
                best = [0.0] * size
                for i, price in zip(used, solved, strict=True):
                    best[i] = price / largest[i]
    return best


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


def _solve(matrix: list[list[float]], right: list[float]) -> list[float] | None:
    """x of matrix x = right for a Gram matrix, by elimination with pivots; None where columns follow from each other."""
    size, least = len(right), 1e-9 * max(matrix[i][i] for i in range(len(right)))
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for column in range(size):
        pivot = max(range(column, size), key=lambda row: abs(rows[row][column]))
        if abs(rows[pivot][column]) <= least:
            return None
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for row in range(size):
            if row != column:
                factor = rows[row][column] / rows[column][column]
                rows[row] = [a - factor * b for a, b in zip(rows[row], rows[column], strict=True)]
    return [row[size] / row[i] for i, row in enumerate(rows)]
