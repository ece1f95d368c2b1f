"""What the ring benchmark puts into ranks before it measures, and how it weighs them."""

import os
from pathlib import Path

import torch

from bench.ring.ranks import most_resident_bytes, random_kv
from kvplane_runtime.ring.architectures import Architecture
from kvplane_runtime.ring.ranges import Range

SHAPE = Architecture(model_type="llama", layers=2, query_heads=4, key_heads=2, head_dim=8, context_tokens=4096)


def test_what_is_filled_is_a_rank_s_share_and_does_not_grow_while_it_is_decoded_from() -> None:
    layout, shard = random_kv(SHAPE, rank=1, ranks=2, tokens=924, room=100)
    assert [layout.length, layout.tokens(0), layout.tokens(1)] == [924, 462, 462]
    before = [shard.read(layer, Range(0, 1)).data_ptr() for layer in range(2)]
    one = torch.zeros(2, 1, 8)
    for slot in range(462, 462 + 100):
        for layer in range(2):
            shard.write(layer, slot, one, one)
    assert [shard.read(layer, Range(0, 1)).data_ptr() for layer in range(2)] == before


def test_the_most_memory_is_at_least_what_there_is() -> None:
    held = b"x" * (64 << 20)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert most_resident_bytes() >= len(held)
    assert most_resident_bytes() >= 0.9 * resident  # the kernel counts resident pages in batches
