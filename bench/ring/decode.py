"""Decode from long contexts: two ranks on two processors beside one rank on one, as two GPUs beside one.

What two processors of a machine can do at once, which share its memory, is measured beside it: both ranks decode, each from its
half, and exchange nothing.

The KV is filled with random numbers: what decode costs does not depend on them, and computing 262,144 tokens would take hours.
"""

from bench.ring import models
from bench.ring.figures import Decode
from bench.ring.ranks import Crew
from bench.ring.sizes import Size
from e2e.cluster.progress import Progress

SPARE = 100
"""Tokens below the length at which it begins, and room for as many: the cache grows by copies, and none shall fall into what
is timed."""


def measure(size: Size, progress: Progress) -> Decode:
    """Every length, in turns."""
    one: dict[str, list[float]] = {}
    two: dict[str, list[float]] = {}
    apart: dict[str, list[float]] = {}
    with Crew(models.DECODE, 2) as crew:
        for length in size.decode_lengths:
            key, filled = str(length), length - SPARE
            one[key], two[key], apart[key] = [], [], []
            crew.all("fill", tokens=filled, room=SPARE)
            crew.all("decode", count=2)
            crew.first("decode_alone", count=2)
            crew.all("decode_apart", count=2)
            for number in range(1, size.decode_pairs + 1):
                with progress.step(f"decode from {length}: {number}/{size.decode_pairs}") as step:
                    two[key] += crew.all("decode", count=size.decode_tokens)[0]
                    one[key] += crew.first("decode_alone", count=size.decode_tokens)
                    apart[key] += map(max, *crew.all("decode_apart", count=size.decode_tokens))
                    step.detail = f"one {1000 * one[key][-1]:.0f} ms, two {1000 * two[key][-1]:.0f} ms"
            crew.all("drop")
    return Decode(one, two, apart, str(size.decode_lengths[-1]))
