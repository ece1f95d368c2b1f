"""One block against the definition, and blocks merged in any way against all keys at once."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvplane_runtime.ring.kernel import NOTHING, _cuda, block, mask, products
from kvplane_runtime.ring.merge import Running, combine, with_sinks

HEADS = ((8, 8), (8, 2), (6, 1))
ERROR = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def drawn(
    rows: int, keys: int, heads: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, count, length, 32, generator=generator).to(dtype)
        for count, length in ((heads[0], rows), (heads[1], keys), (heads[1], keys))
    ]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize(("rows", "keys", "causal"), [(70, 70, True), (70, 300, False), (1, 77, False), (5, 3, False)])
def test_a_block_is_what_the_definition_says(
    heads: tuple[int, int], dtype: torch.dtype, rows: int, keys: int, causal: bool
) -> None:
    query, key, value = drawn(rows, keys, heads, dtype)
    out, lse = block(query, key, value, scale=0.2, causal=causal)
    expected, expected_lse = products(query.double(), key.double(), value.double(), scale=0.2, causal=causal)
    assert (out - expected).abs().max() < ERROR[dtype]
    assert (lse - expected_lse).abs().max() < ERROR[dtype]
    assert out.dtype == dtype
    assert lse.dtype == torch.float32


def test_strides_do_not_matter() -> None:
    query, key, value = drawn(40, 60, (8, 2))
    apart = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (query, key, value)]
    for one, other in zip(block(query, key, value, scale=0.2), block(*apart, scale=0.2), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("masked", [False, True])
def test_a_gpu_kernel_that_knows_no_groups_gets_them_as_a_batch(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is none here, but takes and gives what that of a GPU does: as many key heads as queries', and a padded lse."""

    def kernel(*given: Any, scale: float) -> tuple[Tensor, Tensor]:
        query, key, value, bias, wants_lse, dropout, causal = given
        assert query.shape[:2] == key.shape[:2] == value.shape[:2] == (2, 4)
        assert (wants_lse, dropout) == (True, 0.0)
        assert bias is None or bias.shape == (2, 4, 9, 9)
        bias = None if bias is None else bias.unsqueeze(2)
        out, lse = products(query, key, value, scale=scale, causal=causal, bias=bias)
        return out, torch.nn.functional.pad(lse, (0, 32 - 9), value=float("inf"))

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", kernel)
    query, key, value = drawn(9, 9, (8, 2))
    bias = mask(torch.ones(9, 9, dtype=torch.bool).tril(2), torch.float32).bias if masked else None
    found = _cuda(query, key, value, scale=0.2, causal=not masked, bias=bias)
    expected = products(query, key, value, scale=0.2, causal=not masked, bias=bias)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < 1e-6


def test_a_query_that_sees_nothing_weighs_nothing() -> None:
    query, key, value = drawn(6, 9, (8, 2))
    visible = torch.ones(6, 9, dtype=torch.bool).tril(2)
    visible[[0, 4]] = False
    out, lse = block(query, key, value, scale=0.2, bias=mask(visible, torch.float32))
    assert torch.equal(lse[0, :, [0, 4]], torch.full((8, 2), NOTHING))
    assert not out.isnan().any()
    running = Running(query)
    everything = block(query, key, value, scale=0.2)
    running.add((everything[0].clone(), everything[1].clone()))
    running.add((out, lse))
    merged, merged_lse = running.partial()
    assert torch.equal(merged[:, :, [0, 4]], everything[0][:, :, [0, 4]])
    assert torch.equal(merged_lse[:, :, [0, 4]], everything[1][:, :, [0, 4]])


def test_no_keys_and_no_queries() -> None:
    query, key, value = drawn(4, 0, (8, 2))
    out, lse = block(query, key, value, scale=0.2)
    assert (out == 0).all()
    assert (lse == NOTHING).all()
    query, key, value = drawn(0, 5, (8, 2))
    assert block(query, key, value, scale=0.2)[0].shape == (1, 8, 0, 32)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(1, 9), st.randoms(use_true_random=False))
def test_blocks_merge_into_attention_over_all_keys(sizes: list[int], rows: int, order: object) -> None:
    """In any order; and a block may concern some of the queries only."""
    query, key, value = drawn(rows, sum(sizes) + 1, (4, 2), seed=rows)
    bounds = [0, *itertools.accumulate(sizes), sum(sizes) + 1]
    parts = list(itertools.pairwise(bounds))
    order.shuffle(parts)  # type: ignore[attr-defined]
    running = Running(query)
    outs, lses = [], []
    for begin, end in parts:
        half = rows // 2
        found = block(query, key[:, :, begin:end], value[:, :, begin:end], scale=0.3)
        outs.append(found[0].clone())  # Running takes over what it is given
        lses.append(found[1].clone())
        if len(parts) % 2:
            running.add(found)
        else:
            running.add((found[0][:, :, half:], found[1][:, :, half:]), begin=half)
            running.add((found[0][:, :, :half], found[1][:, :, :half]), end=half)
    expected, expected_lse = products(query, key, value, scale=0.3)
    for out, lse in (running.partial(), combine(torch.stack(outs), torch.stack(lses))):
        assert (out - expected).abs().max() < 1e-5
        assert (lse - expected_lse).abs().max() < 1e-5


def test_ranks_that_all_see_nothing_make_zeros() -> None:
    out, lse = combine(torch.zeros(3, 2, 4, 8), torch.full((3, 2, 4), NOTHING))
    assert (out == 0).all()
    assert (lse == NOTHING).all()
    query = torch.ones(1, 2, 3, 4)
    running = Running(query)
    assert (running.partial()[1] == NOTHING).all()
    running.add((torch.zeros(1, 2, 3, 4), torch.full((1, 2, 3), NOTHING)))
    running.add((torch.zeros(1, 2, 3, 4), torch.full((1, 2, 3), NOTHING)))
    out, lse = running.partial()
    assert (out == 0).all()
    assert (lse == NOTHING).all()


def test_a_sink_is_one_more_term_of_the_denominator() -> None:
    query, key, value = drawn(5, 7, (4, 2))
    sinks = torch.tensor([0.5, -1.0, 2.0, NOTHING])
    found = with_sinks(block(query, key, value, scale=0.3), sinks)
    scores = (query @ key.repeat_interleave(2, 1).transpose(-1, -2)) * 0.3
    weights = torch.softmax(torch.cat([scores, sinks.view(1, 4, 1, 1).expand(1, 4, 5, 1)], -1), -1)[..., :-1]
    assert (found - weights @ value.repeat_interleave(2, 1)).abs().max() < 1e-6


def test_huge_logits_do_not_overflow() -> None:
    query, key, value = drawn(3, 8, (4, 2))
    running = Running(query)
    for begin in (0, 4):
        running.add(block(query * 1e3, key[:, :, begin : begin + 4], value[:, :, begin : begin + 4], scale=10.0))
    expected, _ = products(query * 1e3, key, value, scale=10.0)
    assert (running.partial()[0] - expected).abs().max() < 1e-5
