"""What can be asked for."""

import pytest

from kvplane_runtime.admission.demand import Demand, Reason


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompt_tokens", 0, "prompt_tokens must be at least 1; it is 0."),
        ("outputs", 0, "outputs must be at least 1; it is 0."),
        ("max_output_tokens", 0, "max_output_tokens must be at least 1; it is 0."),
        ("max_output_tokens", -5, "max_output_tokens must be at least 1; it is -5."),
        ("priority", -1, "priority must be at least 0; it is -1."),
        ("prompt_bytes", -1, "prompt_bytes must be at least 0; it is -1."),
    ],
)
def test_a_field_out_of_bounds_is_named(field: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Demand(**{"prompt_tokens": 1, field: value})  # type: ignore[arg-type]


def test_reasons_are_the_words_that_clients_read() -> None:
    assert {str(reason) for reason in Reason} == {
        "kv",
        "prefill",
        "sequences",
        "queue-full",
        "deadline",
        "tenant",
        "context-length",
    }
