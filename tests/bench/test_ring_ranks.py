"""What the ring benchmark puts into ranks before it measures."""

import torch

from bench.ring.ranks import random_kv
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
