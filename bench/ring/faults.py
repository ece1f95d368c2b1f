"""A rank is killed, or stands still, while a long prompt is being answered: how soon, how much again, and the same tokens."""

import asyncio
import itertools
import signal
import tempfile
import time
from pathlib import Path
from typing import Final

from bench.ring import models, sizes
from bench.ring.figures import Fault, Faults
from bench.ring.peers import Unsharded
from bench.ring.ranks import prompt
from bench.ring.served import POLL_SECONDS, Answer, Served, write
from bench.ring.sizes import Size
from e2e.cluster.progress import Progress

RANKS: Final = 4
VICTIM: Final = 2
"""Opposite of rank 0: not the neighbour that notices a closed connection first."""
UNDER_WAY_TOKENS: Final = 20
DRILL_SECONDS: Final = 300.0
"""Of one drill; a stream that is stuck carries comments for ever."""
SIGNALS: Final = {"kill": signal.SIGKILL, "hang": signal.SIGSTOP}


async def measure(size: Size, progress: Progress) -> Faults:
    """All drills, kills and hangs in turns."""
    vocabulary = models.LONG.options["vocab_size"]
    drills = []
    with tempfile.TemporaryDirectory(prefix="kvplane-bench-ring-") as folder:
        model = write(models.LONG, Path(folder) / "model")
        logs = Path(folder) / "logs"
        logs.mkdir()
        with Unsharded(model) as unsharded:
            async with Served(model, ranks=RANKS, logs=logs, settings=sizes.SETTINGS) as served:
                rounds = itertools.product(range(size.fault_rounds), SIGNALS)
                for number, (_, kind) in enumerate(rounds, start=1):
                    ids = prompt(size.fault_prompt, vocabulary=vocabulary, seed=number)
                    with progress.step(f"a rank of {RANKS} lost by {kind}, {size.fault_prompt} tokens") as step:
                        expected = await asyncio.to_thread(unsharded.greedy, ids, size.fault_tokens)
                        async with asyncio.timeout(DRILL_SECONDS):
                            drill = await _drill(served, kind, ids, expected)
                        step.detail = f"noticed {drill.detect_seconds:.2f} s, works {drill.reform_seconds:.2f} s"
                    drills.append(drill)
                    await _heal(served, kind)
    return Faults(RANKS, drills)


async def _drill(served: Served, kind: str, ids: list[int], expected: list[int]) -> Fault:
    before = await served.ring()
    answer = Answer()
    asking = asyncio.create_task(served.ask(ids, count=len(expected), into=answer))
    while len(answer.tokens) < UNDER_WAY_TOKENS:
        if asking.done():
            raise RuntimeError(f"The request ended before the drill: {answer.error or answer.tokens}.")
        await asyncio.sleep(POLL_SECONDS)
    placed = len(ids) + len(answer.tokens)
    hurt = time.monotonic()
    served.signal(VICTIM, SIGNALS[kind])
    formed = await served.formed([rank for rank in range(RANKS) if rank != VICTIM])
    reform = time.monotonic() - hurt
    await asking
    after = await served.ring()
    return Fault(
        kind=kind,
        detect_seconds=max(0.0, reform - formed["lastRecoverySeconds"]),
        reform_seconds=reform,
        refilled=after["refilledTokensTotal"] - before["refilledTokensTotal"],
        placed=placed,
        equal=answer.error is None and answer.tokens == expected,
    )


async def _heal(served: Served, kind: str) -> None:
    if kind == "kill":
        served.start(VICTIM)
    else:
        served.signal(VICTIM, signal.SIGCONT)
    await served.formed(range(RANKS))
