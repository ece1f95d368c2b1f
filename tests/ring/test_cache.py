"""The KV of one sequence on one rank: what is written stays, in little more memory than it needs."""

import pytest
import torch

from kvplane_runtime.ring.cache import Shard
from kvplane_runtime.ring.ranges import Range

EVERYTHING = Range(0, 1 << 30)


@pytest.mark.parametrize("tokens", [1, 25, 90, 256, 281, 1000])
def test_a_shard_takes_little_more_room_than_is_written(tokens: int) -> None:
    """Room is given out by tokens: a thousand short sequences that are kept must not take a multiple of it."""
    shard = Shard(1)
    for slot in range(tokens):
        shard.write(0, slot, torch.full((2, 1, 4), float(slot)), torch.full((2, 1, 4), -float(slot)))
    there = shard.read(0, EVERYTHING)
    assert tokens <= there.shape[2] <= 1.25 * tokens + 32
    written = torch.arange(tokens).float()
    assert torch.equal(there[0, 1, :tokens, 3], written)
    assert torch.equal(there[1, 0, :tokens, 0], -written)


def test_what_is_kept_moves_up_to_the_front() -> None:
    shard = Shard(1)
    values = torch.arange(10.0).view(1, 10, 1)
    shard.write(0, 0, values, -values)
    shard.keep((Range(1, 3), Range(7, 8)))
    assert shard.read(0, EVERYTHING)[0, 0, :, 0].tolist() == [1, 2, 7]
    shard.write(0, 3, torch.full((1, 1, 1), 9.0), torch.full((1, 1, 1), -9.0))
    assert shard.read(0, Range(0, 4))[1, 0, :, 0].tolist() == [-1, -2, -7, -9]
    shard.keep(())
    with pytest.raises(ValueError, match="nothing was written there"):
        shard.read(0, EVERYTHING)
