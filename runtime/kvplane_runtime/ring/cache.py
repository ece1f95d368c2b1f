"""The KV that this rank holds: one shard for each sequence, and the cache that transformers' models write it through.

A shard has, for each layer, keys and values head-major in one tensor [2, Hk, capacity, D]: on a CPU that is 2 to 4 times
faster to decode from than token-major. Which position lies in which slot is the layout's to know
(:mod:`~kvplane_runtime.ring.layout`), and so is how many slots are used: a step that broke half way has written behind
them, and the next one writes over it.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from kvplane_runtime.ring.ranges import Range, count

_UNIT: Final = 32
"""Slots of a new shard, and of which its capacity is a multiple. Few: room is given out by tokens, and of a short sequence most
ranks hold a handful."""
_GROWTH: Final = 1.25
"""A full shard grows by this factor, which copies it; what is not written yet takes no memory on Linux."""


class Shard:
    """One sequence's KV on this rank."""

    def __init__(self, layers: int) -> None:
        self._layers: list[Tensor | None] = [None] * layers

    def write(self, layer: int, slot: int, key: Tensor, value: Tensor) -> None:
        """Puts ``key`` and ``value`` [Hk, L, D] into the slots from ``slot`` on; those before are kept."""
        heads, length, size = key.shape
        store = self._layers[layer]
        end = slot + length
        if store is None or store.shape[2] < end:
            grown = key.new_empty((2, heads, self._capacity(store, end), size))
            if store is not None:
                grown[:, :, :slot] = store[:, :, :slot]
            self._layers[layer] = store = grown
        store[0, :, slot:end] = key
        store[1, :, slot:end] = value

    @staticmethod
    def _capacity(store: Tensor | None, needed: int) -> int:
        grown = 0 if store is None else int(store.shape[2] * _GROWTH)
        return -(-max(needed, grown) // _UNIT) * _UNIT

    def read(self, layer: int, slots: Range) -> Tensor:
        """Keys and values [2, Hk, L, D] of the slots; no copy."""
        store = self._layers[layer]
        if store is None:
            raise ValueError(
                f"Slots {slots.begin} to {slots.end} of layer {layer} are read, and nothing was written there."
            )
        return store[:, :, slots.begin : slots.end]

    def keep(self, slots: Sequence[Range]) -> None:
        """Keeps these slots, ascending, which move up to the front; copies only what is behind a hole."""
        kept = count(slots)
        if slots and (len(slots) > 1 or slots[0].begin):
            for layer, store in enumerate(self._layers):
                if store is not None:
                    moved = torch.cat([store[:, :, part.begin : part.end] for part in slots], dim=2)
                    self._layers[layer] = moved
        elif not kept:
            self._layers = [None] * len(self._layers)

    def copy(self, slots: Sequence[Range]) -> "Shard":
        """A shard of its own with what lies in these slots."""
        other = Shard(len(self._layers))
        if slots:
            other._layers = [
                None if store is None else torch.cat([store[:, :, part.begin : part.end] for part in slots], dim=2)
                for store in self._layers
            ]
        return other


class _Layer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """Stands for a layer where a model asks about its cache; there is nothing to ask for, since positions are given."""

    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("A layer of a ring's cache keeps no tensors.")

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class RingCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """What a model is given as its cache for one pass: hands new keys and values to ``store`` and gives them back as they are.

    The attention function gets the new ones only, and reads all others from the shards.
    """

    def __init__(self, layers: int, store: "Any") -> None:
        super().__init__(layers=[_Layer() for _ in range(layers)])
        self._store = store

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        self._store(layer_idx, key_states, value_states)
        return key_states, value_states
