"""How a window of a prompt is cut over the ranks so that causal attention gives each the same work.

Of 2N pieces of equal length, rank r gets the pieces r and 2N - 1 - r: an early one, whose queries see little, and a late
one, whose queries see much. Per ring step every rank then computes the same area of the causal triangle. The cut is known
from Striped and zigzag ring attention (arXiv 2311.09431; zhuzilin/ring-flash-attention) and from Meta's context
parallelism (arXiv 2411.01783, section 3.5.1). The last token of a window lies on rank 0, which samples.
"""

import itertools
from typing import TypeVar

from kvplane_runtime.ring.ranges import Range

T = TypeVar("T")


def counts(length: int, ranks: int) -> tuple[int, ...]:
    """Positions in each of the 2N pieces, in the order of the window. They differ by one at most; the last has at least one."""
    if length < 1 or ranks < 1:
        raise ValueError(f"A window has at least one token and a ring one rank; they are {length} and {ranks}.")
    bounds = [length * piece // (2 * ranks) for piece in range(2 * ranks + 1)]
    return tuple(end - begin for begin, end in itertools.pairwise(bounds))


def deal(pieces: tuple[T, ...]) -> tuple[tuple[T, T], ...]:
    """By rank, its early and its late piece of the 2N ``pieces``."""
    return tuple((pieces[rank], pieces[-1 - rank]) for rank in range(len(pieces) // 2))


def pieces(window: Range, ranks: int) -> tuple[tuple[Range, Range], ...]:
    """By rank, the two ranges of a contiguous window; either may be empty where the window is short."""
    cut: list[Range] = []
    begin = window.begin
    for size in counts(len(window), ranks):
        cut.append(Range(begin, begin + size))
        begin += size
    return deal(tuple(cut))
