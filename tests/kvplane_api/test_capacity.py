"""Capacity arithmetic: the figures of the papers and of the docs, and what must hold for all inputs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane_api.capacity import (
    CapacityError,
    ModelFacts,
    bytes_per_element,
    fit,
    kv_bytes_per_token,
    ring_fit,
)

LLAMA_8B = ModelFacts(layers=32, kv_heads=8, head_dim=128, parameters=8_030_261_248)
GIB = 2**30

facts = st.builds(
    ModelFacts,
    layers=st.integers(1, 200),
    kv_heads=st.integers(1, 128),
    head_dim=st.integers(16, 512),
    parameters=st.integers(10**6, 10**12),
)
tokens = st.integers(1, 10**7)
memory = st.integers(1, 200).map(lambda gib: gib * GIB)


def test_bytes_per_token_of_llama_8b() -> None:
    assert kv_bytes_per_token(LLAMA_8B) == 131_072
    assert kv_bytes_per_token(LLAMA_8B, kv_cache_dtype="fp8") == 65_536


def test_an_8b_model_on_80_gib() -> None:
    found = fit(LLAMA_8B, context_tokens=131_072, accelerator_bytes=80 * GIB)
    left = 80 * GIB * 85 // 100 - 2 * LLAMA_8B.parameters
    assert found.fits
    assert (found.kv_bytes, found.capacity_tokens) == (left, left // 131_072 // 16 * 16)


def test_weights_that_do_not_fit_leave_nothing() -> None:
    found = fit(LLAMA_8B, context_tokens=1, accelerator_bytes=8 * GIB)
    assert (found.fits, found.kv_bytes, found.capacity_tokens) == (False, 0, 0)


def test_heads_are_repeated_beyond_their_number() -> None:
    """Sixteen accelerators hold eight KV heads twice: the second eight add memory for weights, not for tokens."""
    eight = fit(LLAMA_8B, context_tokens=1, accelerator_bytes=40 * GIB, accelerators=8)
    sixteen = fit(LLAMA_8B, context_tokens=1, accelerator_bytes=40 * GIB, accelerators=16)
    assert sixteen.kv_bytes - eight.kv_bytes == 8 * (2 * LLAMA_8B.parameters // 8 - 2 * LLAMA_8B.parameters // 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit(LLAMA_8B, context_tokens=0, accelerator_bytes=1), "context_tokens must be at least 1; it is 0."),
        (
            lambda: fit(LLAMA_8B, context_tokens=1, accelerator_bytes=0),
            "accelerator_bytes must be at least 1; it is 0.",
        ),
        (
            lambda: fit(LLAMA_8B, context_tokens=1, accelerator_bytes=1, accelerators=0),
            "accelerators must be at least 1; it is 0.",
        ),
        (
            lambda: fit(LLAMA_8B, context_tokens=1, accelerator_bytes=1, block_size=0),
            "block_size must be at least 1; it is 0.",
        ),
        (
            lambda: ring_fit(LLAMA_8B, context_tokens=1, rank_bytes=0),
            "rank_bytes must be at least 1; it is 0.",
        ),
        (
            lambda: ring_fit(LLAMA_8B, context_tokens=1, rank_bytes=1, spare_ranks=-1),
            "spare_ranks must not be negative; it is -1.",
        ),
    ],
)
def test_refusals_name_bound_and_value(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(CapacityError) as error:
        call()
    assert str(error.value) == message


@pytest.mark.parametrize(("dtype", "size"), [("auto", 2), ("bfloat16", 2), ("float32", 4), ("fp8_e5m2", 1), ("new", 2)])
def test_bytes_per_element(dtype: str, size: int) -> None:
    assert bytes_per_element(dtype) == size


@given(facts, tokens, memory, memory, st.integers(1, 16))
def test_more_memory_never_holds_less(model: ModelFacts, context: int, one: int, other: int, accelerators: int) -> None:
    less, more = sorted((one, other))
    small = fit(model, context_tokens=context, accelerator_bytes=less, accelerators=accelerators)
    large = fit(model, context_tokens=context, accelerator_bytes=more, accelerators=accelerators)
    assert small.capacity_tokens <= large.capacity_tokens
    assert large.fits or not small.fits


@given(facts, tokens, memory, st.integers(1, 15))
def test_more_accelerators_never_hold_less(model: ModelFacts, context: int, size: int, accelerators: int) -> None:
    fewer = fit(model, context_tokens=context, accelerator_bytes=size, accelerators=accelerators)
    more = fit(model, context_tokens=context, accelerator_bytes=size, accelerators=accelerators + 1)
    assert fewer.capacity_tokens <= more.capacity_tokens


@given(facts, tokens, memory)
def test_smaller_elements_never_hold_less(model: ModelFacts, context: int, size: int) -> None:
    wide = fit(model, context_tokens=context, accelerator_bytes=size)
    narrow = fit(model, context_tokens=context, accelerator_bytes=size, kv_cache_dtype="fp8")
    assert narrow.capacity_tokens >= wide.capacity_tokens


@given(facts, tokens, memory)
def test_what_fits_stays_within_memory(model: ModelFacts, context: int, size: int) -> None:
    found = fit(model, context_tokens=context, accelerator_bytes=size)
    assert found.capacity_tokens * found.kv_bytes_per_token <= found.kv_bytes
    assert found.kv_bytes + (found.weight_bytes if found.kv_bytes else 0) <= size
    assert found.fits == (context <= found.capacity_tokens)


class TestRing:
    def test_a_million_tokens_of_llama_8b_on_80_gib(self) -> None:
        found = ring_fit(LLAMA_8B, context_tokens=1_000_000, rank_bytes=80 * GIB)
        assert found.kv_bytes == (80 * GIB - 2 * LLAMA_8B.parameters) * 60 // 100
        assert (found.rank_tokens, found.size) == (found.kv_bytes // 131_072, 4)

    def test_two_ranks_are_the_least(self) -> None:
        assert ring_fit(LLAMA_8B, context_tokens=1, rank_bytes=80 * GIB).size == 2

    def test_a_rank_to_lose_is_one_more(self) -> None:
        assert ring_fit(LLAMA_8B, context_tokens=1_000_000, rank_bytes=80 * GIB, spare_ranks=1).size == 5

    def test_kv_is_of_the_dtype_of_the_weights(self) -> None:
        assert ring_fit(LLAMA_8B, context_tokens=1, rank_bytes=80 * GIB, dtype="float32").kv_bytes_per_token == 262_144

    def test_where_the_weights_leave_nothing_no_ring_does(self) -> None:
        found = ring_fit(LLAMA_8B, context_tokens=1, rank_bytes=16 * 10**9)
        assert (found.size, found.rank_tokens, found.kv_bytes) == (None, 0, 0)

    @given(facts, tokens, memory, st.integers(0, 2))
    def test_it_is_the_smallest_that_holds_the_context(
        self, model: ModelFacts, wanted: int, rank_bytes: int, spare: int
    ) -> None:
        found = ring_fit(model, context_tokens=wanted, rank_bytes=rank_bytes, spare_ranks=spare)
        if found.size is None:
            assert found.rank_tokens == 0
            return
        assert (found.size - spare) * found.rank_tokens >= wanted
        assert found.size == 2 or (found.size - spare - 1) * found.rank_tokens < wanted
