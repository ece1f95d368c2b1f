"""The loads that the detector is judged on.

A swept case is calm for three minutes, with a working set of 0.4 of the cache, and then has one of the sizes of the
sweep. The cases that must not fire look like thrashing to one signal or another: the cache churns, the hit rate falls,
usage is high; but nothing is computed twice.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from bench.thrash.loads import MEAN_CHAT_TOKENS, Chats, Load, OneShots, Questions, Together
from bench.thrash.model import Engine
from bench.thrash.trial import Trial, run

CALM_SECONDS: Final = 180.0
SECONDS: Final = 480.0
CALM_RATIO: Final = 0.4
RATIOS: Final = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 3.0)
"""Working set over cache."""

Change = tuple[float, Callable[[Engine], Engine]]


@dataclass(frozen=True)
class Case:
    """One run, but for its seed."""

    name: str
    engine: Callable[[], Engine]
    load: Callable[[random.Random], Load]
    must_not_fire: bool = False
    changes: Sequence[Change] = ()

    def run(self, *, seed: int, events: bool) -> Trial:
        """Runs it."""
        return run(self.engine(), self.load(random.Random(seed)), seconds=SECONDS, events=events, at=self.changes)


def _then(first: float, later: float) -> Callable[[float], float]:
    return lambda now: first if now < CALM_SECONDS else later


def _always(value: float) -> Callable[[float], float]:
    return lambda now: value


def _chat_engine(offload_blocks: int = 0) -> Engine:
    return Engine(blocks=1024, offload_blocks=offload_blocks)


def _users(ratio: float, engine: Engine) -> float:
    return round(ratio * engine.blocks * engine.block_size / MEAN_CHAT_TOKENS)


def chats(ratio: float, *, offload: bool = False) -> Case:
    """More conversations than the cache can remember: thrashing of kind prefix, or offload with a second tier."""
    users = _then(_users(CALM_RATIO, _chat_engine()), _users(ratio, _chat_engine()))
    return Case(
        f"{'chats with offloading' if offload else 'chats'} {ratio:g}",
        lambda: _chat_engine(offload_blocks=16384 if offload else 0),
        lambda random_: Chats(users=users, think_seconds=5.0, random_=random_),
    )


def one_shots(ratio: float) -> Case:
    """More requests at once than the cache can hold: thrashing of kind preemption."""
    clients, context = 32, 150 + 400
    blocks = round(clients * context / 16 / ratio)
    return Case(
        f"one-shots {ratio:g}",
        lambda: Engine(blocks=blocks),
        lambda random_: OneShots(
            clients=_then(round(CALM_RATIO * clients / max(1.0, ratio)), clients),
            prompt_tokens=(50, 250),
            output_tokens=(200, 600),
            think_seconds=0.5,
            random_=random_,
        ),
    )


def questions(ratio: float) -> Case:
    """More documents than the cache can remember, some of them asked about often."""
    documents = round(ratio * 1024 * 16 / 800)
    return Case(
        f"questions {ratio:g}",
        lambda: Engine(blocks=1024),
        lambda random_: Questions(
            per_second=_then(0.5, 5.0), documents=documents, document_tokens=800, zipf=0.8, random_=random_
        ),
    )


SWEPT: Final[tuple[Callable[[float], Case], ...]] = (chats, one_shots, questions)


def _restarted(engine: Engine) -> Engine:
    fresh = Engine(blocks=engine.blocks, block_size=engine.block_size)
    fresh.now = engine.now + 20.0
    for request in (*engine.running, *engine.waiting):
        request.blocks, request.computed, request.cached, request.preempted = [], 0, 0, False
        fresh.add(request)
    return fresh


def _reloaded(engine: Engine) -> Engine:
    engine.clear_cache()
    return engine


def must_not_fire() -> list[Case]:
    """Each with the signal that it disturbs."""
    few, fitting = _users(0.3, _chat_engine()), _users(0.65, _chat_engine())

    def fitting_chats(random_: random.Random) -> Load:
        return Chats(users=_always(fitting), think_seconds=5.0, random_=random_)

    def one_shot_clients(clients: Callable[[float], float], random_: random.Random) -> Load:
        return OneShots(
            clients=clients, prompt_tokens=(200, 800), output_tokens=(20, 100), think_seconds=0.2, random_=random_
        )

    return [
        Case("cold start", _chat_engine, fitting_chats, must_not_fire=True),
        Case("weights reloaded (cache cleared)", _chat_engine, fitting_chats, True, ((240.0, _reloaded),)),
        Case("engine restarted", _chat_engine, fitting_chats, True, ((240.0, _restarted),)),
        Case("steady one-shot traffic", _chat_engine, lambda r: one_shot_clients(_always(16), r), True),
        Case("one-shot traffic comes up", _chat_engine, lambda r: one_shot_clients(_then(2, 16), r), True),
        Case("busy, nearly full, all fits", lambda: Engine(blocks=1300), one_shots(0.8).load, True),
        Case(
            "hit rate falls: one-shots instead of chats",
            _chat_engine,
            lambda r: Together(
                Chats(users=_then(fitting, 0), think_seconds=5.0, random_=r), one_shot_clients(_then(0, 16), r)
            ),
            True,
        ),
        Case(
            "new users all the time",
            _chat_engine,
            lambda r: Together(
                Chats(users=_always(few), think_seconds=2.0, random_=r), one_shot_clients(_always(1), r)
            ),
            True,
        ),
    ]
