"""docs/reference is what the code says."""

from pathlib import Path

import pytest

from kvplane_api import reference
from kvplane_api.conditions import MEANINGS, Reason

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "reference"


@pytest.mark.parametrize("name", sorted(reference.pages()))
def test_pages_are_what_the_code_says(name: str) -> None:
    assert (FOLDER / name).read_text() == reference.pages()[name], "run `make generate`"


def test_every_reason_has_one_meaning_with_a_cure() -> None:
    of_conditions = [(meaning.type, meaning.reason) for meaning in MEANINGS]
    assert len(set(of_conditions)) == len(of_conditions)
    assert {reason for _, reason in of_conditions} == set(Reason)
    assert all(meaning.says.endswith(".") and meaning.cure.endswith(".") for meaning in MEANINGS)
