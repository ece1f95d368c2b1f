"""KV tokens per rank: what each sequence holds and may still come to hold, and what is free.

A sequence is charged both, on every rank, from its admission to its end. So what is admitted can always end, and no rank
ever runs out of memory. Finished sequences that are kept for their prefixes (*kept*) are charged what they hold, and can be
dropped at any time.

With ``Reserve.SURVIVE`` the sequences that are not kept fill each rank only to (N - 1) / N: when a rank is lost, its share
is spread over the N - 1 others and finds room there. One percent is left for the rounding of that spreading.
"""

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Tokens = tuple[int, ...]
"""KV tokens by rank."""


class Reserve(enum.Enum):
    """What admission keeps free."""

    OFF = "Off"
    SURVIVE = "Survive"
    """What the share of any one rank needs on the others."""


def usable(capacity: int, ranks: int, reserve: Reserve) -> int:
    """KV tokens that sequences in progress may take on a rank of ``capacity``; 0 where a lone rank is to be survived."""
    if reserve is Reserve.OFF:
        return capacity
    return capacity * (ranks - 1) * 99 // (ranks * 100)


@dataclass(frozen=True, slots=True)
class _Charge:
    tokens: Tokens
    kept: bool


class Accounting:
    """The charges of all sequences, over ranks of equal capacity."""

    def __init__(self, *, ranks: int, capacity: int, reserve: Reserve) -> None:
        self.ranks = ranks
        self.capacity = capacity
        """KV tokens of each rank."""
        self.limit = usable(capacity, ranks, reserve)
        """KV tokens of each rank that sequences in progress may take."""
        self._charges: dict[int, _Charge] = {}
        self._active = [0] * ranks
        self._kept = [0] * ranks

    def charge(self, sequence: int, tokens: Tokens, *, kept: bool = False) -> None:
        """Sets what ``sequence`` is charged, by rank; ``kept``: it is finished."""
        self.drop(sequence)
        self._charges[sequence] = _Charge(tokens, kept)
        self._add(tokens, kept=kept, sign=1)

    def drop(self, sequence: int) -> None:
        """Gives back what ``sequence`` was charged, if anything."""
        charge = self._charges.pop(sequence, None)
        if charge is not None:
            self._add(charge.tokens, kept=charge.kept, sign=-1)

    def fits(self, demand: Sequence[int], *, without: Iterable[int] = (), reserved: bool = True) -> bool:
        """Whether ``demand`` tokens more can be charged now, once the sequences of ``without`` are dropped.

        ``reserved``: with the reserve kept free; else up to the capacity.
        """
        limit = self.limit if reserved else self.capacity
        dropped = [self._charges[sequence] for sequence in without if sequence in self._charges]
        for rank, more in enumerate(demand):
            gone = sum(charge.tokens[rank] for charge in dropped)
            gone_active = sum(charge.tokens[rank] for charge in dropped if not charge.kept)
            if self._active[rank] - gone_active + more > limit:
                return False
            if self._active[rank] + self._kept[rank] - gone + more > self.capacity:
                return False
        return True

    @property
    def active(self) -> Tokens:
        """Charged to sequences in progress, by rank."""
        return tuple(self._active)

    @property
    def kept(self) -> Tokens:
        """Charged to finished sequences, by rank."""
        return tuple(self._kept)

    @property
    def free(self) -> Tokens:
        """Charged to nobody, by rank."""
        return tuple(self.capacity - active - kept for active, kept in zip(self._active, self._kept, strict=True))

    def _add(self, tokens: Tokens, *, kept: bool, sign: int) -> None:
        total = self._kept if kept else self._active
        for rank, count in enumerate(tokens):
            total[rank] += sign * count


def zigzag_share(length: int, ranks: int) -> int:
    """Most tokens that one rank gets of ``length`` in windows of which all but the last are multiples of 2 x ranks.

    A rank gets 2 of a window's 2N pieces (:mod:`zigzag`), and no piece is longer than the length over 2N, rounded up.
    """
    return 2 * -(-length // (2 * ranks))


def decode_shares(first: int, count: int, ranks: int) -> Tokens:
    """Tokens that each rank gets of the positions ``first`` to ``first + count`` when position p goes to rank p mod N."""
    return tuple(len(range(first + (rank - first) % ranks, first + count, ranks)) for rank in range(ranks))
