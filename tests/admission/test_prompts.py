"""Tokens of a prompt, from its bytes."""

import pytest

from kvplane_runtime.admission.prompts import PromptLengths


def test_the_first_guess_is_rather_too_many() -> None:
    assert PromptLengths().estimate(3000, "") == 1000


def test_each_tenant_has_its_own_average() -> None:
    lengths = PromptLengths()
    for _ in range(50):
        lengths.learn(4000, 1000, "prose")
        lengths.learn(2000, 1000, "code")
    assert lengths.estimate(4000, "prose") == 1000
    assert lengths.estimate(4000, "code") == 2000


def test_a_new_tenant_is_taken_for_an_average_one() -> None:
    lengths = PromptLengths()
    lengths.learn(4000, 1000, "prose")
    assert lengths.estimate(4000, "new") == 1000


def test_the_average_follows_a_tenant_that_changes() -> None:
    lengths = PromptLengths()
    lengths.learn(4000, 1000, "")
    for _ in range(60):
        lengths.learn(2000, 1000, "")
    assert lengths.bytes_per_token("") == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize(("text_bytes", "tokens"), [(0, 10), (10, 0), (-1, 1), (1_000_000, 1), (10, 1000)])
def test_implausible_reports_teach_nothing(text_bytes: int, tokens: int) -> None:
    lengths = PromptLengths()
    lengths.learn(text_bytes, tokens, "")
    assert lengths.bytes_per_token("") == 3.0


def test_an_empty_prompt_has_a_token() -> None:
    assert PromptLengths().estimate(0, "") == 1


def test_a_negative_size_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"text_bytes must be at least 0; it is -1\."):
        PromptLengths().estimate(-1, "")


def test_memory_is_bounded() -> None:
    lengths = PromptLengths()
    for number in range(5000):
        lengths.learn(400, 100, f"tenant-{number}")
    assert len(lengths) == 1024
