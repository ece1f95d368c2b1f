"""The demo model's arithmetic; that vLLM serves it is shown on the cluster."""

import pytest

from tests.images.sources import load

make_model = load("demo-model/make_model.py")
Shape = make_model.Shape


def test_the_default_shape_has_seven_million_weights() -> None:
    assert Shape().parameters == 7_145_728
    assert Shape().head_dim == 32


def test_a_token_takes_keys_and_values_of_each_layer() -> None:
    assert Shape().kv_bytes_per_token(bytes_per_value=4) == 2 * 4 * 4 * 32 * 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden": 250}, "hidden must be a multiple of heads, got 250 and 8."),
        ({"kv_heads": 3}, "heads must be a multiple of kv_heads, got 8 and 3."),
        ({"vocabulary": 256}, "vocabulary must hold every byte and the special tokens, 261, got 256."),
    ],
)
def test_an_impossible_shape_is_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shape(**wrong)


def test_the_text_has_words_enough_for_the_vocabulary() -> None:
    words = {word for line in make_model.training_text() for word in line.split()}
    assert len(words) > 60_000


def test_the_text_is_always_the_same() -> None:
    assert list(make_model.training_text()) == list(make_model.training_text())
