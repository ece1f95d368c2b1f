"""The part of the history that survives a restart, as one JSON document for a ConfigMap; at most ``MOST_BYTES`` long.

What survives is what takes long to learn: start times, seasonal demand, the demand of the last hours, the errors of the
forecasts, what was learned of the replicas, and a panic's end. All else is seen again within one window, in which nothing
goes down. A document that was changed by hand, or that another version wrote, is read as none.
"""

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from kvplane_operator.autoscaler.forecast import Loss, Method, Outlook
from kvplane_operator.autoscaler.history import History, fresh
from kvplane_operator.autoscaler.learned import Learned, Usable
from kvplane_operator.autoscaler.panic import Panic
from kvplane_operator.autoscaler.room import BINS, LEAST_MARGIN, MOST_MARGIN, Answers, index_of, restored
from kvplane_operator.autoscaler.series import BUCKETS, MINUTES, Series, Steps
from kvplane_operator.autoscaler.settings import Tuning
from kvplane_operator.autoscaler.startup import SAMPLES, StartTimes

MOST_BYTES: Final = 16 * 1024
_DIGITS: Final = 3

_Amount = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
_Bin = Annotated[int, Field(ge=index_of(LEAST_MARGIN), le=index_of(MOST_MARGIN))]
_Starts = Annotated[tuple[_Amount, ...], Field(max_length=SAMPLES)]


class _Run(BaseModel):
    """Demand at equal steps from ``first`` on; None where it is not known."""

    model_config = ConfigDict(frozen=True)

    first: Annotated[int, Field(ge=0, le=10**9)] = 0
    values: Annotated[tuple[_Amount | None, ...], Field(max_length=BUCKETS)] = ()


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True)

    version: Literal[1] = 1
    usable_share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
    prefill_tokens_per_second: _Amount | None
    residence_seconds: _Amount
    fastest_prompt_tokens_per_second: _Amount | None = None
    answers: Annotated[tuple[tuple[_Bin, _Amount, _Amount], ...], Field(max_length=BINS)] = ()
    """(bin of the margin, kept, broken)."""
    starts_cached: _Starts
    starts_pulled: _Starts
    minutes: _Run
    buckets: _Run
    losses: dict[Method, tuple[_Amount, Annotated[int, Field(ge=0)]]]
    panic_until: _Amount | None
    panic_peak: Annotated[int, Field(ge=0)] | None


def dump(history: History) -> str:
    """What of the history is to survive."""
    learned, series = history.learned, history.series
    prefill, fastest = learned.prefill_tokens_per_second, learned.room.fastest
    document = _Document(
        usable_share=round(learned.usable.share, _DIGITS),
        prefill_tokens_per_second=None if prefill is None else round(prefill, _DIGITS),
        residence_seconds=round(learned.residence_seconds, _DIGITS),
        fastest_prompt_tokens_per_second=None if fastest is None else round(fastest, _DIGITS),
        answers=tuple(
            (index, round(answers.kept, _DIGITS), round(answers.broken, _DIGITS))
            for index, answers in learned.room.bins.items()
        ),
        starts_cached=tuple(round(seconds, _DIGITS) for seconds in history.starts.cached),
        starts_pulled=tuple(round(seconds, _DIGITS) for seconds in history.starts.pulled),
        minutes=_run(series.minutes),
        buckets=_run(series.buckets),
        losses={
            method: (round(loss.mean, _DIGITS), min(loss.count, 10**6))
            for method, loss in history.outlook.losses.items()
        },
        panic_until=None if history.panic.until is None else round(history.panic.until, _DIGITS),
        panic_peak=history.panic.peak,
    )
    return document.model_dump_json()


def load(text: str | None, tuning: Tuning) -> History:
    """The history that ``dump`` wrote; a fresh one where there is none, or none that can be read."""
    if text is None:
        return fresh(tuning)
    try:
        document = _Document.model_validate_json(text)
    except ValueError:
        return fresh(tuning)
    return History(
        learned=Learned(
            usable=Usable(share=min(max(document.usable_share, tuning.usable_least), tuning.usable_most)),
            prefill_tokens_per_second=document.prefill_tokens_per_second or None,
            residence_seconds=document.residence_seconds,
            room=restored(
                {index: Answers(kept, broken) for index, kept, broken in document.answers},
                fastest=document.fastest_prompt_tokens_per_second or None,
            ),
        ),
        starts=StartTimes(cached=document.starts_cached, pulled=document.starts_pulled),
        series=Series(
            minutes=_steps(document.minutes, most=MINUTES),
            buckets=_steps(document.buckets, most=BUCKETS),
        ),
        outlook=Outlook(losses={method: Loss(mean, count) for method, (mean, count) in document.losses.items()}),
        panic=Panic(until=document.panic_until, peak=document.panic_peak),
    )


def _run(steps: Steps) -> _Run:
    return _Run(
        first=steps.first, values=tuple(round(value, _DIGITS) if value >= 0 else None for value in steps.values)
    )


def _steps(run: _Run, *, most: int) -> Steps:
    known = [(run.first + at, value) for at, value in enumerate(run.values) if value is not None]
    return Steps.of(known[-most:])
