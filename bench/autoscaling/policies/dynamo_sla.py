"""NVIDIA Dynamo's planner in its mode for goals (``optimization_target: sla``), for engines that do both prefill and decode.

Source: ai-dynamo/dynamo, under ``components/src/dynamo/planner/core``: ``load_scaling.py`` (``_advance_load_agg``,
``_agg_prefill_scaling``, ``_agg_decode_scaling``, ``_scale_decision``) at 0c6da1ec762c848fe31cef804e70d171eef4d622,
``throughput_scaling.py`` (``_throughput_agg``) at 0c9050c9145373a09157ded5f64e6784abb1dc3b, ``state_machine.py``
(``on_tick``) at 0272cbdd7e813bbc5223aa7e6f579df43282a1a3. Examples in our tests: ``tests/unit/test_load_based_scaling.py``
at 059237235453784082ea14ecd1a3cc748f5490da and ``test_state_machine.py`` at 518a70279da932774915f3b039b6978f9b1057f8.

Every 5 s: one more where all engines are predicted to miss the first token's goal, or all the next token's; one less where
the others could take the load of each within 0.8 of both goals. Every 180 s the forecast of requests over what an engine
takes sets a floor. Steps are observed always; nothing is decided while a replica is under way, or one does not report.

Choices that favour it: both loops are on, where the default has only the slow one; its goals are the benchmark's; arrivals
count whether admission let them in or not. Its regression begins empty, without the sweep before a deployment: five
observations later it is there.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from bench.autoscaling.policies.dynamo_model import (
    LEAST_SAMPLES,
    Constant,
    Kalman,
    Model,
    Plane,
    capacity,
    first_token_seconds,
    fitted,
    noted,
)
from bench.autoscaling.policy import Engine, Fleet

DOWN_SENSITIVITY: Final = 0.8
"""``load_scaling_down_sensitivity``."""
FORECAST_SECONDS: Final = 180.0
"""``throughput_adjustment_interval``."""


@dataclass(frozen=True, slots=True)
class Goals:
    """Of the first token and of each further one."""

    ttft_seconds: float = 2.0
    itl_seconds: float = 0.05


@dataclass(frozen=True, slots=True)
class Counters:
    """Requests that came and that were let in, and tokens; of one engine, or of all within an interval."""

    came: float = 0.0
    admitted: float = 0.0
    prompt_tokens: float = 0.0
    generation_tokens: float = 0.0

    def plus(self, after: "Counters", before: "Counters") -> "Counters":
        """With what was added from one reading of an engine to the next."""
        return Counters(
            self.came + after.came - before.came,
            self.admitted + after.admitted - before.admitted,
            self.prompt_tokens + after.prompt_tokens - before.prompt_tokens,
            self.generation_tokens + after.generation_tokens - before.generation_tokens,
        )


Forecast = Constant | Kalman


@dataclass(frozen=True, slots=True)
class Forecasts:
    """Of an interval's requests, and of their lengths."""

    requests: Forecast
    prompt: Forecast
    output: Forecast

    def seen(self, interval: Counters) -> "Forecasts":
        """Lengths stay where nothing came."""
        requests = self.requests.seen(interval.came)
        if not interval.admitted:
            return replace(self, requests=requests)
        return Forecasts(
            requests,
            self.prompt.seen(interval.prompt_tokens / interval.admitted),
            self.output.seen(interval.generation_tokens / interval.admitted),
        )


@dataclass(frozen=True)
class Memory:
    """What it has learned, and the floor."""

    forecasts: Forecasts
    forecast_at: float
    model: Model = field(default_factory=Model)
    read: Mapping[str, Counters] = field(default_factory=dict)
    """Each engine's counters at the last look."""
    interval: Counters = Counters()
    floor: int = 1


def decided(plane: Plane, model: Model, engines: Sequence[Engine], goals: Goals) -> int:
    """Workers by the predicted latencies of all of them, each engine ready."""
    workers = len(engines)
    late = all(_first_token(plane, model, each, 1.0) > goals.ttft_seconds for each in engines)
    slow = all(_next_token(plane, model, _kv_tokens(each)) > goals.itl_seconds for each in engines)
    if late or slow:
        return workers + 1
    if workers > 1 and all(_could_go(plane, model, each, workers=workers, goals=goals) for each in engines):
        return workers - 1
    return workers


def _could_go(plane: Plane, model: Model, engine: Engine, *, workers: int, goals: Goals) -> bool:
    """Whether an engine would keep its goals with its share of the load of one that goes.

    A prompt's own time is not the queue's fault: only the rest of the goal counts.
    """
    more = workers / (workers - 1)
    own = first_token_seconds(
        plane, model.prompt, queued=0, kv_tokens=int(_kv_tokens(engine) * more), budget=engine.max_batched_tokens
    )
    room = (goals.ttft_seconds - own) * DOWN_SENSITIVITY
    if room <= 0 or _first_token(plane, model, engine, more) - own >= room:
        return False
    kv_tokens = int((_kv_tokens(engine) + engine.waiting_prompt_tokens) * more)
    if kv_tokens >= engine.kv_tokens:
        return False
    return _next_token(plane, model, kv_tokens) < goals.itl_seconds * DOWN_SENSITIVITY


def _first_token(plane: Plane, model: Model, engine: Engine, more: float) -> float:
    return first_token_seconds(
        plane,
        model.prompt,
        queued=int(engine.waiting_prompt_tokens * more),
        kv_tokens=int(_kv_tokens(engine) * more),
        budget=engine.max_batched_tokens,
    )


def _next_token(plane: Plane, model: Model, kv_tokens: float) -> float:
    return plane.seconds(model.chunk, kv_tokens + model.context)


def _kv_tokens(engine: Engine) -> float:
    return engine.forward_pass.decode_kv_tokens if engine.forward_pass else 0.0


@dataclass(frozen=True)
class DynamoSla:
    """``forecast``: its ``load_predictor``; None: without the slow loop."""

    forecast: Forecast | None = field(default_factory=Kalman)
    goals: Goals = Goals()
    tick_seconds: float = 5.0
    name: str = "dynamo sla"

    def start(self, fleet: Fleet, now: float) -> Memory:
        forecast = self.forecast or Constant()
        return Memory(Forecasts(forecast, forecast, forecast), forecast_at=now + FORECAST_SECONDS)

    def decide(self, fleet: Fleet, memory: Memory, now: float) -> tuple[int, Memory]:
        memory = _observed(fleet, memory)
        plane = fitted(memory.model.samples)
        wanted = fleet.asked
        if fleet.seen and len(fleet.seen) == fleet.asked and len(memory.model.samples) >= LEAST_SAMPLES:
            by_load = fleet.asked if plane is None else decided(plane, memory.model, fleet.seen, self.goals)
            wanted = max(by_load, memory.floor)
        if self.forecast is not None and fleet.seen and now >= memory.forecast_at:
            memory = self._floored(memory, plane, fleet.seen[0], now)
        return wanted, memory

    def _floored(self, memory: Memory, plane: Plane | None, engine: Engine, now: float) -> Memory:
        """The floor until the next forecast; it stays where the engine's capacity is not known."""
        forecasts = memory.forecasts.seen(memory.interval)
        memory = replace(memory, forecasts=forecasts, interval=Counters(), forecast_at=now + FORECAST_SECONDS)
        if plane is None:
            return memory
        takes = capacity(
            plane,
            memory.model.prompt,
            prompt=forecasts.prompt.forecast(),
            output=forecasts.output.forecast(),
            kv_tokens=engine.kv_tokens,
            max_sequences=engine.max_sequences,
            budget=engine.max_batched_tokens,
            ttft_seconds=self.goals.ttft_seconds,
            itl_seconds=self.goals.itl_seconds,
        )
        if takes <= 0:
            return memory
        return replace(memory, floor=max(1, math.ceil(forecasts.requests.forecast() / FORECAST_SECONDS / takes)))


def _observed(fleet: Fleet, memory: Memory) -> Memory:
    model, interval = memory.model, memory.interval
    read = dict(memory.read)
    for engine in fleet.seen:
        model = noted(model, engine.forward_pass)
        counters = Counters(
            engine.admitted_total + engine.refused_total,
            engine.admitted_total,
            engine.prompt_tokens_total,
            engine.generation_tokens_total,
        )
        interval = interval.plus(counters, read.get(engine.name, Counters()))
        read[engine.name] = counters
    return replace(memory, model=model, interval=interval, read=read)
