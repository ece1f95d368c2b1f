"""The loads that the detector is judged on.

A swept case is calm for three minutes, with a working set of 0.4 of the cache, and then has one of the sizes of the
sweep. The cases that must not fire look like thrashing to one signal or another: the cache churns, the hit rate falls,
usage is high; but nothing is computed twice.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from bench.thrash.loads import MEAN_CHAT_TOKENS, Chats, Load, OneShots, Questions, Together, Users
from bench.thrash.model import Engine
from bench.thrash.trial import Change, Run, run

CALM_SECONDS: Final = 180.0
SECONDS: Final = 480.0
CALM_RATIO: Final = 0.4
RATIOS: Final = (0.5, 0.7, 0.85, 1.0, 1.2, 1.35, 1.5, 2.0, 3.0)
"""Working set over cache."""


@dataclass(frozen=True)
class Case:
    """One run, but for its seed."""

    name: str
    engine: Callable[[], Engine]
    load: Callable[[random.Random], Load]
    must_not_fire: bool = False
    changes: Sequence[Change] = ()

    def run(self, *, seed: int) -> Run:
        """Runs it."""
        return run(self.engine(), self.load(random.Random(seed)), seconds=SECONDS, changes=self.changes)


def _then(first: float, later: float) -> Users:
    return lambda now: first if now < CALM_SECONDS else later


def _always(value: float) -> Users:
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
    calm = round(CALM_RATIO * _CLIENTS / max(1.0, ratio))
    return Case(
        f"one-shots {ratio:g}",
        lambda: Engine(blocks=_blocks_for_clients(ratio)),
        lambda random_: _long_answers(_then(calm, _CLIENTS), random_),
    )


def longer_answers(ratio: float) -> Case:
    """The same, after traffic that evicts as much as an engine can: evictions fall when the thrashing begins."""
    return Case(
        f"longer answers {ratio:g}",
        lambda: Engine(blocks=_blocks_for_clients(ratio)),
        lambda random_: Together(_short_answers(_then(4, 0), random_), _long_answers(_then(0, _CLIENTS), random_)),
    )


_CLIENTS: Final = 32


def _blocks_for_clients(ratio: float) -> int:
    return round(_CLIENTS * (150 + 400) / 16 / ratio)


def _long_answers(clients: Users, random_: random.Random) -> OneShots:
    return OneShots(
        clients=clients, prompt_tokens=(50, 250), output_tokens=(200, 600), think_seconds=0.5, random_=random_
    )


def _short_answers(clients: Users, random_: random.Random) -> OneShots:
    return OneShots(
        clients=clients, prompt_tokens=(200, 800), output_tokens=(20, 100), think_seconds=0.2, random_=random_
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


SWEPT: Final[tuple[Callable[[float], Case], ...]] = (chats, questions, one_shots, longer_answers)


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
    few, fitting = _users(0.2, _chat_engine()), _users(CALM_RATIO, _chat_engine())

    def chats_for(users: Users, random_: random.Random) -> Chats:
        return Chats(users=users, think_seconds=5.0, random_=random_)

    def fitting_chats(random_: random.Random) -> Load:
        return chats_for(_always(fitting), random_)

    def quiet(
        name: str,
        load: Callable[[random.Random], Load],
        engine: Callable[[], Engine] = _chat_engine,
        changes: Sequence[Change] = (),
    ) -> Case:
        return Case(name, engine, load, must_not_fire=True, changes=changes)

    return [
        quiet("cold start", fitting_chats),
        quiet("weights reloaded, cache cleared", fitting_chats, changes=((240.0, _reloaded),)),
        quiet("engine restarted", fitting_chats, changes=((240.0, _restarted),)),
        quiet("steady one-shot traffic", lambda random_: _short_answers(_always(16), random_)),
        quiet("one-shot traffic comes up", lambda random_: _short_answers(_then(2, 16), random_)),
        quiet("nearly full, and all fits", one_shots(0.8).load, lambda: Engine(blocks=_blocks_for_clients(0.8))),
        quiet(
            "hit rate falls: one-shots take the place of chats",
            lambda random_: Together(chats_for(_then(fitting, 0), random_), _short_answers(_then(0, 16), random_)),
        ),
        quiet(
            "a few chats among one-shots",
            lambda random_: Together(
                Chats(users=_always(few), think_seconds=1.0, random_=random_), _short_answers(_always(1), random_)
            ),
        ),
    ]
