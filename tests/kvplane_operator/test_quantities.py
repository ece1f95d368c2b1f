"""Kubernetes quantities."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane_operator.plan.quantities import equal, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", "0"),
        ("2", "2"),
        ("500m", "0.5"),
        ("1.5Gi", str(3 * 2**29)),
        ("2000M", "2e9"),
        ("1e3", "1000"),
        ("1E3", "1000"),
        ("1E", "1e18"),
        (".5", "0.5"),
        ("-1", "-1"),
        ("100n", "1e-7"),
        (3, "3"),
        (0.25, "0.25"),
    ],
)
def test_values(text: str | float, value: str) -> None:
    assert parse(text) == Decimal(value)


@pytest.mark.parametrize("text", ["", "Gi", "1 Gi", "1GB", "1gi", "one", "1Gi ", "0x10"])
def test_what_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a quantity; write it like 500m, 2 or 1\.5Gi\."):
        parse(text)


@pytest.mark.parametrize(
    ("left", "right"), [("1Gi", "1024Mi"), ("0.5", "500m"), (4, "4"), ("1k", 1000), ("1.50", "1.5"), ("1e3", "1k")]
)
def test_equal_however_written(left: object, right: object) -> None:
    assert equal(left, right)
    assert equal(right, left)


@pytest.mark.parametrize(("left", "right"), [("1G", "1Gi"), ("a", "a"), (True, 1), (None, "0"), (["1"], ["1"])])
def test_not_equal(left: object, right: object) -> None:
    assert not equal(left, right)


@given(st.integers(0, 10**12), st.sampled_from(["", "k", "M", "Ki", "Mi", "Gi"]))
def test_a_suffix_is_a_factor(number: int, suffix: str) -> None:
    assert parse(f"{number}{suffix}") == number * parse(f"1{suffix}")
