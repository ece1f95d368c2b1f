"""What NVIDIA Dynamo's planner knows of an engine in its mode for goals: the time of a step by regression, and load forecasts.

Source: ai-dynamo/dynamo, under ``components/src/dynamo/planner/core``: ``perf_model/agg.py`` at
518a70279da932774915f3b039b6978f9b1057f8 (what is predicted), ``perf_model/base.py`` at
439d645817d60b4c89de6053fc8135269d54405a (which steps are kept, and when a fit is refused), ``load/predictors.py`` at
260b6ae9412cea46626b25b11407fbebd30e5cb0 (the Kalman filter); that it begins after five points and never forecasts less
than nothing is in ``tests/unit/test_load_predictors.py`` at 004551e8439d832be0d267f8158c073a8f3f0e03. Defaults:
``config/defaults.py`` at 1ca601557ebf7cf963a3c0a1bcbae45fd2166944.

The planner's default forecast is an automatic ARIMA from a library; its two others that need none are here. Discounts for
prefix hits are left out: no run here has any.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from bench.autoscaling.policy import ForwardPass

SAMPLES: Final = 64
"""Steps that are kept (``max_num_fpm_samples``)."""
LEAST_SAMPLES: Final = 5
_AXIS: Final = 4
"""Buckets of each axis: the root of ``fpm_sample_bucket_size``."""
_COLLINEAR: Final = 1e-12
_LEAST_SECONDS: Final = 1e-6

Sample = tuple[float, float, float]
"""Prompt tokens, KV tokens of those that decode, seconds."""


@dataclass(frozen=True, slots=True)
class Plane:
    """Seconds of a step, by what is in it."""

    base: float
    per_prompt_token: float
    per_kv_token: float

    def seconds(self, prompt_tokens: float, kv_tokens: float) -> float:
        seconds = self.base + self.per_prompt_token * prompt_tokens + self.per_kv_token * kv_tokens
        return max(_LEAST_SECONDS, seconds)


@dataclass(frozen=True)
class Model:
    """The steps seen, and means of late ones."""

    samples: tuple[Sample, ...] = ()
    lows: tuple[float, float] = (math.inf, math.inf)
    """Fewest prompt tokens and KV tokens of a step ever, and the most: the buckets lie between."""
    highs: tuple[float, float] = (-math.inf, -math.inf)
    prompts: tuple[float, ...] = ()
    """Prompt tokens of each request in a step that had some."""
    contexts: tuple[float, ...] = ()
    """KV tokens of each request that decoded."""
    chunks: tuple[float, ...] = ()
    """Prompt tokens of steps."""

    @property
    def prompt(self) -> float:
        return _mean(self.prompts)

    @property
    def context(self) -> float:
        return _mean(self.contexts)

    @property
    def chunk(self) -> float:
        return _mean(self.chunks)


def noted(model: Model, step: ForwardPass | None, *, most: int = SAMPLES) -> Model:
    """With one step more. Of too many the oldest goes of those in the fullest bucket, so that rare loads stay known."""
    if step is None:
        return replace(model, chunks=_windowed(model.chunks, 0.0, most))
    prompts = _windowed(model.prompts, step.prompt_tokens / step.prompts, most) if step.prompts else model.prompts
    contexts = _windowed(model.contexts, step.decode_kv_tokens / step.decodes, most) if step.decodes else model.contexts
    at = (step.prompt_tokens, step.decode_kv_tokens)
    lows = (min(model.lows[0], at[0]), min(model.lows[1], at[1]))
    highs = (max(model.highs[0], at[0]), max(model.highs[1], at[1]))
    samples = (*model.samples, (*at, step.seconds))
    if len(samples) > most:
        keys = [_bucket(each, lows, highs) for each in samples]
        oldest = keys.index(max(keys, key=keys.count))
        samples = samples[:oldest] + samples[oldest + 1 :]
    chunks = _windowed(model.chunks, step.prompt_tokens, most)
    return Model(samples=samples, lows=lows, highs=highs, prompts=prompts, contexts=contexts, chunks=chunks)


def fitted(samples: Sequence[Sample]) -> Plane | None:
    """Least squares; None with too few steps, and where more work would take less time.

    Where both loads move together the solution of least norm, as of numpy's ``lstsq``.
    """
    if len(samples) < LEAST_SAMPLES:
        return None
    means = [sum(each[axis] for each in samples) / len(samples) for axis in range(3)]
    centred = [(prompt - means[0], kv - means[1], seconds - means[2]) for prompt, kv, seconds in samples]
    pp, pk, kk, ps, ks = (
        sum(each[a] * each[b] for each in centred) for a, b in ((0, 0), (0, 1), (1, 1), (0, 2), (1, 2))
    )
    determinant, trace = pp * kk - pk * pk, pp + kk
    if determinant > _COLLINEAR * pp * kk:
        slopes = ((ps * kk - ks * pk) / determinant, (ks * pp - ps * pk) / determinant)
    elif trace > 0:
        slopes = (ps / trace, ks / trace)
    else:
        slopes = (0.0, 0.0)
    if min(slopes) < 0:
        return None
    return Plane(means[2] - slopes[0] * means[0] - slopes[1] * means[1], *slopes)


def first_token_seconds(plane: Plane, mean_prompt: float, *, queued: float, kv_tokens: float, budget: int) -> float:
    """Until the first token of a request that comes now: the queue's prompts and its own, in steps of ``budget`` tokens."""
    left, seconds = queued + mean_prompt, 0.0
    while left > 0:
        seconds += plane.seconds(min(left, budget), kv_tokens)
        left -= budget
    return seconds


def capacity(
    plane: Plane,
    mean_prompt: float,
    *,
    prompt: float,
    output: float,
    kv_tokens: int,
    max_sequences: int,
    budget: int,
    ttft_seconds: float,
    itl_seconds: float,
) -> float:
    """Requests per second that one engine takes within both goals; those of a single stream where even that breaks one.

    The batch is at most what memory, ``max_sequences`` and the balance of prompts and outputs allow; 0 without traffic.
    """
    if prompt <= 0 or output <= 0:
        return 0.0
    context = prompt + output / 2
    balanced = math.floor(budget - prompt / output)
    largest = max(1, min(int(kv_tokens / max(1.0, context)), max_sequences, budget - 1, balanced))
    best = 0.0
    for batch in range(1, largest + 1):
        kv, chunk = batch * context, min(batch * prompt / max(1.0, output), budget)
        step = plane.seconds(chunk, kv)
        first = first_token_seconds(plane, mean_prompt, queued=int(chunk), kv_tokens=int(kv), budget=budget)
        broken = step > itl_seconds or first > ttft_seconds
        if broken and batch > 1:
            break
        best = batch / (output * step)
        if broken:
            break
    return best


@dataclass(frozen=True, slots=True)
class Constant:
    """The next value is the last one."""

    last: float = 0.0
    begun: bool = False

    def seen(self, value: float) -> "Constant":
        return Constant(value, begun=True) if value or self.begun else self

    def forecast(self) -> float:
        return self.last


@dataclass(frozen=True, slots=True)
class Kalman:
    """A level and a trend (Kalman 1960), one step of the loop at a time. Silence before the first value does not count."""

    count: int = 0
    last: float = 0.0
    level: float = 0.0
    trend: float = 0.0
    covariance: tuple[float, float, float] = (1000.0, 0.0, 1000.0)
    """Of level, of both, of trend."""
    level_noise: float = 1.0
    trend_noise: float = 0.1
    noise: float = 10.0
    least: int = 5
    """Values until which the last one is the forecast."""

    def seen(self, value: float) -> "Kalman":
        if not self.count:
            return replace(self, count=1, last=value, level=value) if value else self
        both, trend = self.covariance[1], self.covariance[2]
        expected = self.level + self.trend
        # P = F P F' + Q, with F = [[1, 1], [0, 1]].
        p00, p01, p11 = self.covariance[0] + 2 * both + trend + self.level_noise, both + trend, trend + self.trend_noise
        gain_level, gain_trend = p00 / (p00 + self.noise), p01 / (p00 + self.noise)
        error = value - expected
        return replace(
            self,
            count=self.count + 1,
            last=value,
            level=expected + gain_level * error,
            trend=self.trend + gain_trend * error,
            covariance=((1 - gain_level) * p00, (1 - gain_level) * p01, p11 - gain_trend * p01),
        )

    def forecast(self) -> float:
        if self.count < self.least:
            return self.last
        return max(0.0, self.level + self.trend)


def _windowed(window: tuple[float, ...], value: float, most: int) -> tuple[float, ...]:
    """The last values; zeros before the first other one do not count."""
    return (*window, value)[-most:] if value or window else window


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _bucket(sample: Sample, lows: tuple[float, float], highs: tuple[float, float]) -> tuple[int, ...]:
    return tuple(
        min(int((value - low) / (high - low) * _AXIS), _AXIS - 1) if high > low else 0
        for value, low, high in zip(sample[:2], lows, highs, strict=True)
    )
