"""The error that the ring benchmark calls an architecture exact by."""

import math

import pytest
import torch

from bench.ring.exact import largest_error


@pytest.mark.parametrize(
    ("found", "error"),
    [([1.0, 2.0, 2.5], 0.5), ([1.0, float("nan"), 3.0], math.inf), ([1.0, 2.0, float("-inf")], math.inf)],
)
def test_a_logit_that_is_no_number_is_an_error(found: list[float], error: float) -> None:
    assert largest_error(torch.tensor(found), torch.tensor([1.0, 2.0, 3.0])) == error
