"""Times to the first token of real processes: a long prompt beside the peers', and short ones beside a long prefill."""

import asyncio
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.engine import environment
from bench.ring import models, peers, sizes
from bench.ring.figures import Beside, FirstToken
from bench.ring.peers import Unsharded
from bench.ring.ranks import LONGEST_SECONDS, processors, prompt
from bench.ring.served import NAME, Answer, Served, stretched, write
from bench.ring.sizes import Size
from e2e.cluster.progress import Progress

DEMO_VOCABULARY = 8192
DEMO_LAYERS = 4
SHORT_TOKENS = 64
LONG_SEEDS = 10**6
"""From here on; short prompts have those below. Not their negatives: to Random the sign of a seed is nothing."""


async def first_token(size: Size, progress: Progress) -> FirstToken:
    """The demo's model on a ring of two, on vLLM, and in transformers: the same prompts in turns, each on both processors."""
    tokens, positions = size.first_tokens, 2 * size.first_tokens
    _, demo = await asyncio.to_thread(environment.prepare, progress, layers=DEMO_LAYERS)
    ring: list[float] = []
    unsharded: list[float] = []
    vllm: list[float] = []
    with tempfile.TemporaryDirectory(prefix="kvplane-bench-ring-") as folder:
        model = stretched(demo, Path(folder) / "model", positions=positions)
        logs = Path(folder) / "logs"
        logs.mkdir()
        with Unsharded(model) as transformers:
            async with (
                Served(model, ranks=2, logs=logs, settings=sizes.SETTINGS) as served,
                peers.vllm(tokens=tokens, positions=positions, progress=progress) as engine,
            ):
                await served.formed(range(served.ranks))  # while vLLM starts it has no processor to itself
                for number in range(size.first_pairs + 1):
                    ids = prompt(tokens, vocabulary=DEMO_VOCABULARY, seed=number)
                    with progress.step(f"first token of {tokens}: {number}/{size.first_pairs}") as step:
                        found = (
                            await peers.first_token_seconds(served.url, NAME, ids),
                            (await asyncio.to_thread(transformers.prefill, ids)).seconds,
                            await peers.first_token_seconds(engine.url, engine.model, ids),
                        )
                        step.detail = "ring {:.2f} s, unsharded {:.2f} s, vLLM {:.2f} s".format(*found)
                    if number:  # the first one warms up
                        for samples, seconds in zip((ring, unsharded, vllm), found, strict=True):
                            samples.append(seconds)
    products = await asyncio.to_thread(peers.matrix_products, len(processors()))
    return FirstToken(tokens, ring, unsharded, vllm, products)


async def beside(size: Size, progress: Progress) -> Beside:
    """Short requests one after another: first alone, then while long prompts are computed."""
    vocabulary = models.LONG.options["vocab_size"]
    seeds = iter(range(LONG_SEEDS))
    idle: list[float] = []
    loaded: list[float] = []
    pauses = random.Random(0)

    async def pause() -> None:
        """Before a short request, up to a slice: after a fixed time all would come at the same moment of a window."""
        await asyncio.sleep(pauses.uniform(0.0, sizes.WINDOW_SECONDS))

    async def short() -> float:
        ids = prompt(SHORT_TOKENS, vocabulary=vocabulary, seed=next(seeds))
        return await peers.first_token_seconds(served.url, NAME, ids)

    with tempfile.TemporaryDirectory(prefix="kvplane-bench-ring-") as folder:
        model = write(models.LONG, Path(folder) / "model")
        logs = Path(folder) / "logs"
        logs.mkdir()
        async with Served(model, ranks=len(processors()), logs=logs, settings=sizes.SETTINGS) as served:
            await _prefill(served, size.beside_tokens // 4, vocabulary, seed=0)  # the cost of a window is learned
            with progress.step(f"{size.idle_requests} short requests, idle"):
                for _ in range(size.idle_requests):
                    await pause()
                    idle.append(await short())
            for number in range(1, size.beside_prefills + 1):
                with progress.step(f"short requests beside {size.beside_tokens} tokens: {number}") as step:
                    long = asyncio.create_task(_prefill(served, size.beside_tokens, vocabulary, seed=number))
                    before = len(loaded)
                    await pause()
                    while not long.done():
                        loaded.append(await short())
                        await pause()
                    step.detail = f"{len(loaded) - before} in {(await long).first_seconds or 0.0:.1f} s"
            nobody_was_lost(await served.ring())
    return Beside(size.beside_tokens, sizes.WINDOW_SECONDS, idle, loaded)


def nobody_was_lost(ring: Mapping[str, Any]) -> None:
    """Raises RuntimeError where ``/state`` says that the ring has taken a rank for lost: all of them were only busy."""
    if lost := ring["reforms"]["lost"]:
        raise RuntimeError(f"Busy ranks were taken for lost: {lost} re-forms of a ring of which nobody was killed.")


async def _prefill(served: Served, tokens: int, vocabulary: int, *, seed: int) -> Answer:
    async with asyncio.timeout(LONGEST_SECONDS):
        answer = await served.ask(prompt(tokens, vocabulary=vocabulary, seed=LONG_SEEDS + seed), count=1)
    if answer.error is not None:
        raise RuntimeError(f"A prompt of {tokens} tokens failed: {answer.error}.")
    return answer
