"""Which parameters are tried, and what is told of them."""

import pytest

from bench.autoscaling.study import OURS, Cell, Result, Run
from bench.autoscaling.tuning import HEADER, row, variations
from kvplane_operator.autoscaler.settings import Settings, Tuning


def test_one_field_at_a_time() -> None:
    found = variations(["down_share=0.6,0.8", "step_replicas=2", "cost_of_miss=8"])
    assert [name for name, _ in found] == [
        "as it is",
        "down_share=0.6",
        "down_share=0.8",
        "step_replicas=2",
        "cost_of_miss=8",
    ]
    assert found[0][1] == Settings(max_replicas=1)
    assert found[2][1].tuning == Tuning(down_share=0.8)
    assert found[3][1].tuning == Tuning(step_replicas=2)
    assert found[4][1] == Settings(max_replicas=1, cost_of_miss=8.0)


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("down=0.6", "down is no parameter"),
        ("down_share=", "down_share is a number; '' is none"),
        ("step_replicas=2.5", "step_replicas is a number; '2.5' is none"),
    ],
)
def test_what_cannot_be_tried_is_said(word: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        variations([word])


def test_each_figure_is_of_its_own_cells() -> None:
    def result(trace: str, variant: str, goodput: float, hours: float, reversals: float) -> Result:
        return Result(Run(Cell(trace, variant, 60.0), 101, OURS), goodput, hours, 0.5, reversals, None)

    found = row(
        "as it is",
        [
            result("conv", "stretched", 90.0, 4.0, 9.0),
            result("conv", "diurnal", 100.0, 6.0, 9.0),
            result("code", "raw", 70.0, 50.0, 9.0),
            result("conv", "raw", 10.0, 50.0, 9.0),
            result("conv", "steady", 10.0, 50.0, 0.5),
        ],
    )
    assert found == ("as it is", "95.0", "5.00", "70.0", "0.5", "0.5")
    assert len(found) == len(HEADER)
