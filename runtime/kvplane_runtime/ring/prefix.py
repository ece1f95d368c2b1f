"""Which sequence has computed the longest prefix of a prompt: an index of the hashes of whole blocks of tokens.

Each block's hash takes in that of the block before, so one equal hash means equal tokens from the start. A hit is then
compared token by token, and goes on beyond its last whole block as far as the tokens agree: what is reused is exact
whatever the hash does.

In the index are the sequences in progress, as far as they are computed, and the finished ones that are kept. Which of
these is dropped first when room is needed is also said here: the one that was of no use for the longest time.
"""

import array
import hashlib
from collections.abc import Iterator, Sequence
from typing import Final

BLOCK_TOKENS: Final = 256
"""Shortest prefix that is worth reusing: below, finding it costs what computing it does."""


class Prefixes:
    """The index; sequences are known by their numbers."""

    def __init__(self, *, block: int = BLOCK_TOKENS) -> None:
        self._block = block
        self._tokens: dict[int, Sequence[int]] = {}
        self._known: dict[int, int] = {}
        """By sequence, the positions that are computed."""
        self._chains: dict[int, list[bytes]] = {}
        self._holders: dict[bytes, dict[int, None]] = {}
        self._kept: dict[int, None] = {}
        """Oldest first."""

    def add(self, sequence: int, tokens: Sequence[int], *, known: int) -> None:
        """The first ``known`` of ``tokens`` are computed; called again as they become more, or fewer.

        ``tokens`` is not copied: what is before ``known`` must not change.
        """
        chain = self._chains.setdefault(sequence, [])
        self._tokens[sequence] = tokens
        self._known[sequence] = known
        self.cut(sequence, known=known)
        for begin in range(len(chain) * self._block, known - self._block + 1, self._block):
            digest = self._digest(chain[-1] if chain else b"", tokens[begin : begin + self._block])
            chain.append(digest)
            self._holders.setdefault(digest, {})[sequence] = None

    def cut(self, sequence: int, *, known: int) -> None:
        """At most the first ``known`` tokens of the sequence are computed any more; nothing where it is not in the index."""
        if sequence not in self._known:
            return
        self._known[sequence] = min(known, self._known[sequence])
        chain = self._chains[sequence]
        for digest in chain[known // self._block :]:
            self._unlink(digest, sequence)
        del chain[known // self._block :]

    def remove(self, sequence: int) -> None:
        """The sequence is gone."""
        for digest in self._chains.pop(sequence, ()):
            self._unlink(digest, sequence)
        self._tokens.pop(sequence, None)
        self._known.pop(sequence, None)
        self._kept.pop(sequence, None)

    def keep(self, sequence: int) -> None:
        """The sequence is finished and only kept, or was just of use as such: it is the last to be dropped."""
        self._kept.pop(sequence, None)
        self._kept[sequence] = None

    def take(self, sequence: int) -> None:
        """The sequence is in progress again."""
        del self._kept[sequence]

    def is_kept(self, sequence: int) -> bool:
        """Whether the sequence is finished and kept."""
        return sequence in self._kept

    def kept(self) -> Iterator[int]:
        """Sequences that may be dropped, in the order in which they should be."""
        return iter(tuple(self._kept))

    def find(self, prompt: Sequence[int]) -> list[tuple[int, int]]:
        """(sequence, tokens of the prompt that it has computed), most first; at least a block, and never the whole prompt,
        as the last token's logits are needed.
        """
        most = len(prompt) - 1
        holders: dict[int, None] = {}
        digest, blocks = b"", 0
        while (blocks + 1) * self._block <= most:
            begin = blocks * self._block
            digest = self._digest(digest, prompt[begin : begin + self._block])
            if digest not in self._holders:
                break
            holders = self._holders[digest]
            blocks += 1
        hits = [(sequence, self._agreeing(sequence, prompt, most)) for sequence in holders]
        return sorted((hit for hit in hits if hit[1] >= self._block), key=lambda hit: (-hit[1], hit[0]))

    def alike(self, tokens: Sequence[int]) -> list[int]:
        """Sequences that begin with the same block: whoever has its first KV from another is alike to it."""
        return list(self._holders.get(self._digest(b"", tokens[: self._block]), ()))

    def _agreeing(self, sequence: int, prompt: Sequence[int], most: int) -> int:
        tokens, bound = self._tokens[sequence], min(most, self._known[sequence])
        begin = 0
        while begin < bound:  # by blocks, as comparing slices is fast
            end = min(begin + self._block, bound)
            if list(tokens[begin:end]) != list(prompt[begin:end]):
                return next(at for at in range(begin, end) if tokens[at] != prompt[at])
            begin = end
        return bound

    def _unlink(self, digest: bytes, sequence: int) -> None:
        holders = self._holders[digest]
        del holders[sequence]
        if not holders:
            del self._holders[digest]

    @staticmethod
    def _digest(before: bytes, tokens: Sequence[int]) -> bytes:
        return hashlib.blake2b(before + array.array("q", tokens).tobytes(), digest_size=16).digest()
