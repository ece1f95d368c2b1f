"""Step times of a real engine, fitted: seconds = base + prefill tokens, decodes and context tokens, each at its price.

The steps come from a recorder inside the engine while it serves streams, so what the API server takes of the same CPUs is
in them. Relative errors are minimised, as a step of 5 ms matters as much as one of 50. Steps that another process
interrupted (further from the fit than three median errors) are left out and the rest is fitted again, ROUNDS times; not
left out of the judgement: MAPE and R^2 are over all steps of the half that was not fitted on.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from bench.engine.model import StepTime
from bench.engine.schedule import Step

FITS: Final = Path(__file__).resolve().parent / "fits"
ROUNDS: Final = 5
_OUTLIER: Final = 3.0


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
    """Mean absolute error of a step's time, of steps that were not fitted on."""
    r_squared: float
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
    r_squared: float


def fit_step_time(steps: Sequence[Step]) -> tuple[StepTime, Quality]:
    """Fitted on every other step that has a time and something to do, judged on the rest.

    Raises:
        ValueError: there are fewer than 20 of them.
    """
    timed = [step for step in steps if step.seconds is not None and step.scheduled]
    if len(timed) < 20:
        raise ValueError(f"A fit needs at least 20 timed steps, got {len(timed)}: measure for longer.")
    learned, judged = timed[::2], timed[1::2]
    prices = _prices(learned)
    for _ in range(ROUNDS):
        errors = [_relative_error(prices, step) for step in learned]
        bound = _OUTLIER * statistics.median(errors)
        prices = _prices([step for step, error in zip(learned, errors, strict=True) if error <= bound])
    times = [step.seconds for step in judged if step.seconds is not None]
    mean = statistics.fmean(times)
    residual = sum((seconds - _predicted(prices, step)) ** 2 for seconds, step in zip(times, judged, strict=True))
    quality = Quality(
        mape_percent=100 * statistics.fmean(_relative_error(prices, step) for step in judged),
        r_squared=1 - residual / sum((seconds - mean) ** 2 for seconds in times),
    )
    return StepTime(*prices), quality


def _work(step: Step) -> tuple[float, ...]:
    return (1.0, float(step.prefill_tokens), float(step.decodes), float(step.context_tokens))


def _predicted(prices: Sequence[float], step: Step) -> float:
    return sum(price * amount for price, amount in zip(prices, _work(step), strict=True))


def _relative_error(prices: Sequence[float], step: Step) -> float:
    assert step.seconds is not None
    return abs(_predicted(prices, step) - step.seconds) / step.seconds


def _prices(steps: Sequence[Step]) -> list[float]:
    """Least squares of relative errors; a price below zero is none, and the others are fitted again without it."""
    used = list(range(len(_work(steps[0]))))
    while True:
        rows = [[_work(step)[i] / step.seconds for i in used] for step in steps if step.seconds]
        solved = _least_squares(rows)
        negative = [i for i, price in zip(used, solved, strict=True) if price < 0]
        if not negative:
            prices = [0.0] * len(_work(steps[0]))
            for i, price in zip(used, solved, strict=True):
                prices[i] = price
            return prices
        used = [i for i in used if i not in negative]


def _least_squares(rows: Sequence[Sequence[float]]) -> list[float]:
    """x that minimises the sum of (row · x - 1)^2: the normal equations, by elimination with pivots.

    A column that is zero, or follows from others, gets 0.
    """
    size = len(rows[0])
    scale = [max(abs(row[i]) for row in rows) or 1.0 for i in range(size)]
    scaled = [[value / s for value, s in zip(row, scale, strict=True)] for row in rows]
    matrix = [[sum(row[i] * row[j] for row in scaled) for j in range(size)] for i in range(size)]
    right = [sum(row[i] for row in scaled) for i in range(size)]
    pivots: list[int] = []
    for column in range(size):
        candidates = [i for i in range(size) if i not in pivots]
        row = max(candidates, key=lambda i: abs(matrix[i][column]))
        if abs(matrix[row][column]) < 1e-12 * len(rows):
            pivots.append(-1)
            continue
        pivots.append(row)
        for other in range(size):
            if other != row:
                factor = matrix[other][column] / matrix[row][column]
                matrix[other] = [a - factor * b for a, b in zip(matrix[other], matrix[row], strict=True)]
                right[other] -= factor * right[row]
    return [right[row] / matrix[row][column] / scale[column] if row >= 0 else 0.0 for column, row in enumerate(pivots)]
