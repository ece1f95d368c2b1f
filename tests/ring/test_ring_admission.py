"""What can never fit, in numbers."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from kvplane_runtime.ring.accounting import Reserve
from kvplane_runtime.ring.admission import Room, never_fits, no_room, ring_size, too_many

ROOM = Room(ranks=4, capacity=1000, reserve=Reserve.OFF, model_tokens=None)


def test_what_fits_is_not_refused() -> None:
    assert never_fits(3900, 80, 1, ROOM) is None


def test_the_models_own_context_is_no_matter_of_the_ring() -> None:
    refusal = never_fits(90, 11, 1, Room(4, 1000, Reserve.OFF, model_tokens=100))
    assert refusal is not None
    assert refusal.code == "context_length_exceeded"
    assert refusal.message == (
        "The prompt has 90 tokens and the output may have 11, together 101; the model's context is 100 tokens, whatever the "
        "ring. Send a shorter prompt or a lower max_tokens."
    )


def test_what_the_settings_allow_is_told_where_it_is_less_than_the_models_context() -> None:
    room = Room(4, 1000, Reserve.OFF, model_tokens=100, context_tokens=80)
    refusal = never_fits(90, 11, 1, room)
    assert refusal is not None
    assert (refusal.status, refusal.code) == (400, "context_length_exceeded")
    assert refusal.message == (
        "The prompt has 90 tokens and the output may have 11, together 101; this service is set to take at most 80 tokens, "
        "whatever the ring. Send a shorter prompt or a lower max_tokens."
    )
    assert never_fits(70, 10, 1, room) is None
    assert never_fits(70, 11, 1, room) is not None
    assert "the model's context is 60" in (never_fits(70, 10, 1, replace(room, model_tokens=60)) or refusal).message


def test_the_reserve_and_the_outputs_are_named() -> None:
    refusal = never_fits(1500, 100, 2, Room(4, 1000, Reserve.SURVIVE, None))
    assert refusal is not None
    assert "times 2 outputs; this ring of 4 ranks of 1000 KV tokens holds 2968 beside the share of a lost rank" in (
        refusal.message
    )
    assert "a ring of 5 ranks would do" in refusal.message


def test_a_request_for_no_ring_is_told_so() -> None:
    refusal = never_fits(2_000_000, 1, 1, ROOM)
    assert refusal is not None
    assert "no ring of up to 1024 ranks would do" in refusal.message


@given(st.integers(1, 20_000), st.integers(1, 2_000), st.integers(1, 3), st.sampled_from(list(Reserve)))
def test_the_ring_that_would_do_does_and_a_smaller_one_does_not(
    prompt: int, output: int, outputs: int, reserve: Reserve
) -> None:
    room = Room(4, 500, reserve, None)
    needed = ring_size(prompt, output, outputs, room)
    assert needed is not None
    assert never_fits(prompt, output, outputs, Room(needed, 500, reserve, None)) is None
    if needed > 1:
        assert never_fits(prompt, output, outputs, Room(needed - 1, 500, reserve, None)) is not None


@given(st.integers(1, 4_000), st.integers(1, 3), st.integers(1, 500), st.sampled_from([None, 3_000]))
def test_the_longest_output_fits_and_one_longer_does_not(
    prompt: int, outputs: int, most: int, longest: int | None
) -> None:
    room = Room(4, 1000, Reserve.OFF, model_tokens=longest and longest + 100, context_tokens=longest)
    length = room.output_tokens(prompt, outputs, most=most)
    if never_fits(prompt, 1, outputs, room) is None:
        assert never_fits(prompt, length, outputs, room) is None
        assert length == most or never_fits(prompt, length + 1, outputs, room) is not None
    else:
        assert length == 1


def test_what_does_not_fit_now_is_told_when_to_come_back() -> None:
    refusal = no_room((800, 700), (-5, 300), 7)
    assert (refusal.status, refusal.retry_after_seconds) == (429, 7)
    assert "may need 800 KV tokens on a rank, and 0 are free" in refusal.message
    assert too_many(64, 3).retry_after_seconds == 3
