"""The modelled engine does with blocks what vLLM does, and knows what each token was."""

import random

import pytest

from bench.thrash.loads import Chats
from bench.thrash.model import Engine, Key, Request
from kvplane_runtime.sidecar.kv_events import decode
from kvplane_runtime.signals.ledger import Batch, BlocksRemoved, BlocksStored
from tests.bench import recorded_load
from tests.sidecar.kv_event_files import recorded


def contents(batch: Batch, kind: type[BlocksStored | BlocksRemoved]) -> list[object]:
    return [block for event in batch.events if isinstance(event, kind) for block in event.blocks]


def test_it_stores_and_evicts_block_for_block_what_vllm_does() -> None:
    """Under the same load, step by step; hashes stand for contents."""
    engine, load = recorded_load.engine(), recorded_load.load()
    modelled: list[Batch] = []
    while engine.now < recorded_load.SECONDS:
        for request in load.due(engine.now):
            engine.add(request)
        for request in engine.step():
            load.completed(request, engine.now)
        batch = engine.take_batch()
        if batch is not None:
            modelled.append(batch)
    real = [decode(sequence, payload) for sequence, payload in recorded("0.32.0")]
    assert len(modelled) == len(real) > 100
    hashes: dict[object, object] = {}
    for ours, theirs in zip(modelled, real, strict=True):
        assert theirs.timestamp == pytest.approx(ours.timestamp)
        for kind in (BlocksStored, BlocksRemoved):
            for content, block_hash in zip(contents(ours, kind), contents(theirs, kind), strict=True):
                assert hashes.setdefault(content, block_hash) == block_hash
    assert len(set(hashes.values())) == len(hashes)
    assert engine.counts.preemptions > 10
    assert engine.counts.prefix_hits_tokens > 100


def run(engine: Engine, *requests: Request, steps: int = 10_000) -> None:
    for request in requests:
        engine.add(request)
    for _ in range(steps):
        engine.step()
        if not engine.running and not engine.waiting:
            return
    raise AssertionError("The requests do not end.")


def test_what_fits_is_computed_once() -> None:
    engine = Engine(blocks=100)
    run(engine, Request(text=1, prompt_tokens=100, output_tokens=50))
    run(engine, Request(text=1, prompt_tokens=200, output_tokens=50))
    assert engine.counts.prefix_hits_tokens == 144  # nine full blocks; the tenth never was
    assert engine.counts.wasted_tokens == 0
    assert engine.counts.computed_tokens == 149 + 200 - 144 + 49
    assert engine.usage == 0


def test_what_was_evicted_is_wasted_when_it_comes_back() -> None:
    engine = Engine(blocks=12)
    run(engine, Request(text=1, prompt_tokens=96, output_tokens=2))
    run(engine, Request(text=2, prompt_tokens=176, output_tokens=2))
    run(engine, Request(text=1, prompt_tokens=96, output_tokens=2))
    assert engine.counts.wasted_tokens == 96


def test_a_last_token_is_computed_though_it_is_cached() -> None:
    """vLLM needs its logits. That is no waste: nothing was thrown away."""
    engine = Engine(blocks=20)
    for _ in range(2):
        run(engine, Request(text=1, prompt_tokens=96, output_tokens=1))
    assert (engine.counts.prefix_hits_tokens, engine.counts.wasted_tokens) == (80, 0)


def test_the_newest_request_is_preempted_and_pays() -> None:
    engine = Engine(blocks=10)
    old = Request(text=1, prompt_tokens=60, output_tokens=60)
    new = Request(text=2, prompt_tokens=60, output_tokens=60)
    run(engine, old, new)
    assert (old.preempted, new.preempted) == (False, True)
    assert engine.counts.preemptions == 1
    assert 0 < engine.counts.wasted_tokens < 120
    assert engine.counts.prompt_tokens == 120
    assert engine.counts.generation_tokens == 120


def test_a_second_tier_gives_back_what_was_evicted() -> None:
    engine = Engine(blocks=12, offload_blocks=100)
    run(engine, Request(text=1, prompt_tokens=96, output_tokens=2))
    run(engine, Request(text=2, prompt_tokens=176, output_tokens=2))
    run(engine, Request(text=1, prompt_tokens=96, output_tokens=2))
    assert engine.counts.reloaded_tokens == engine.counts.reloaded_again_tokens == 80
    assert engine.counts.wasted_tokens == 16


@pytest.mark.parametrize("seed", range(3))
def test_no_block_is_lost_and_the_events_say_what_is_cached(seed: int) -> None:
    random_ = random.Random(seed)  # noqa: S311  (a load, not a secret)
    engine, load = Engine(blocks=300), Chats(users=lambda now: 6, think_seconds=1.0, random_=random_)
    cached: dict[object, int] = {}
    while engine.now < 60:
        for request in load.due(engine.now):
            engine.add(request)
        for request in engine.step():
            load.completed(request, engine.now)
        batch = engine.take_batch()
        for event in batch.events if batch else ():
            step = 1 if isinstance(event, BlocksStored) else -1
            for block in getattr(event, "blocks", ()):
                cached[block] = cached.get(block, 0) + step
        assert set(cached.values()) <= {0, 1, 2, 3}
        held = sum(len(request.blocks) for request in engine.running)
        assert round(engine.usage * engine.blocks) <= held <= engine.blocks
    known: list[Key] = [content for content in engine._content if content is not None]
    assert sum(cached.values()) == len(known)
