"""Prefill: efficiency, communication that a slow link would expose, and one long prompt."""

import tempfile
from pathlib import Path

from bench.ring import models, sizes
from bench.ring.figures import Exposed, Long, Prefill
from bench.ring.peers import Unsharded
from bench.ring.ranks import Crew, Ran, prompt, slowed
from bench.ring.served import write
from bench.ring.sizes import Size
from e2e.cluster.progress import Progress

RANKS = 4


def _slowest(ran: list[Ran]) -> float:
    return max(each.seconds for each in ran)


def efficiency(size: Size, progress: Progress) -> Prefill:
    """Every rank computes the whole prompt at once, then all of them compute it together: in turns."""
    tokens = size.prefill_tokens
    whole, ring, waited = [], [], []
    with Crew(models.PREFILL, RANKS) as crew:
        crew.all("whole", tokens=min(1024, tokens), seed=0)
        crew.all("prefill", tokens=min(1024, tokens), window=tokens, seed=0)
        for number in range(1, size.prefill_pairs + 1):
            with progress.step(f"prefill of {tokens}, N = {RANKS}: {number}/{size.prefill_pairs}") as step:
                whole.append(max(crew.all("whole", tokens=tokens, seed=number)))
                ran = crew.all("prefill", tokens=tokens, window=tokens, seed=number)
                ring.append(_slowest(ran))
                waited.append(max(each.waited_seconds for each in ran))
                step.detail = f"unsharded {whole[-1]:.2f} s, ring {ring[-1]:.2f} s"
    return Prefill(RANKS, tokens, whole, ring, waited)


def exposed(size: Size, progress: Progress) -> Exposed:
    """A link that takes a share of the attention's time for each exchange: none, overlapped, and not overlapped."""
    tokens, ranks = size.link_tokens, 2
    order = {"tokens": tokens, "window": tokens, "seed": 1}
    free, overlapped, waiting = [], [], []
    with Crew(models.SLOW_LINK, ranks) as crew:
        crew.all("prefill", **order)
        spent = max(crew.all("attention_seconds", **order))
        # Of each layer, one block of keys is computed for each rank, and the exchange runs beside one of them.
        delay = sizes.COMM_OVER_COMPUTE * spent / (models.SLOW_LINK.options["num_hidden_layers"] * ranks)
        for number in range(1, size.link_rounds + 1):
            with progress.step(f"slow link, {1000 * delay:.0f} ms an exchange: {number}/{size.link_rounds}") as step:
                free.append(_slowest(crew.all("prefill", **order)))
                with slowed(crew, delay, hidden=True):
                    overlapped.append(_slowest(crew.all("prefill", **order)))
                with slowed(crew, delay, hidden=False):
                    waiting.append(_slowest(crew.all("prefill", **order)))
                step.detail = f"{free[-1]:.2f} s, overlapped {overlapped[-1]:.2f} s, not {waiting[-1]:.2f} s"
    return Exposed(sizes.COMM_OVER_COMPUTE, free, overlapped, waiting)


def long(size: Size, progress: Progress) -> Long:
    """One prompt that is much longer than a window, on the ring and by the unsharded model with all processors."""
    tokens = size.long_tokens
    vocabulary = models.LONG.options["vocab_size"]
    ring, whole, equal = [], [], []
    ran: list[Ran] = []
    with (
        tempfile.TemporaryDirectory(prefix="kvplane-bench-ring-") as folder,
        Unsharded(write(models.LONG, Path(folder))) as unsharded,
        Crew(models.LONG, RANKS) as crew,
    ):
        unsharded.prefill(prompt(1024, vocabulary=vocabulary, seed=0))
        crew.all("prefill", tokens=1024, window=1024, seed=0)
        for number in range(1, size.long_pairs + 1):
            with progress.step(f"{tokens} tokens, N = {RANKS}: {number}/{size.long_pairs}") as step:
                ran = crew.all("prefill", tokens=tokens, window=size.long_window, seed=number)
                peer = unsharded.prefill(prompt(tokens, vocabulary=vocabulary, seed=number))
                ring.append(_slowest(ran))
                whole.append(peer.seconds)
                equal.append(ran[0].token == peer.token)
                step.detail = f"ring {ring[-1]:.1f} s, unsharded {whole[-1]:.1f} s"
        resident = crew.all("resident_bytes")
    held = [each.held_tokens for each in ran]
    if sum(held) != tokens:
        raise RuntimeError(f"The ranks hold {held} tokens of a prompt of {tokens}.")
    return Long(RANKS, tokens, ring, whole, held, resident, all(equal))
