"""Only whole, well-formed families of the ring's own metrics are passed on."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvplane_runtime.ring.metrics import METRICS, RingCollector, Tally
from kvplane_runtime.sidecar import passed_on
from tests.ring.fake_engine import STATE

GOOD = """\
# HELP kvplane_ring_members Ranks.
# TYPE kvplane_ring_members gauge
kvplane_ring_members{model_name="chat"} 3.0
"""


def names(text: str) -> list[str]:
    return [family.name for family in passed_on.families(passed_on.lines(text))]


def exposition(collector: Collector) -> str:
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry).decode()


class Passed(Collector):
    def __init__(self, text: str) -> None:
        self._text = text

    def collect(self) -> list[Metric]:
        return list(passed_on.families(self._text))


def test_what_a_ring_exports_of_its_own_goes_out_as_it_came() -> None:
    tally = Tally()
    tally.responses[200] = 1
    engine = exposition(RingCollector(state=lambda: STATE, tally=tally, in_flight=lambda: 2))
    lines = passed_on.lines(engine)
    assert exposition(Passed(lines)) == lines
    assert set(names(engine)) == {metric.name for metric in METRICS if metric.name.startswith("kvplane_ring_")} - {
        "kvplane_ring_loaded_ratio"
    }  # nobody loads


def test_what_an_engine_says_of_itself_in_other_words_stays_with_it() -> None:
    assert passed_on.lines("# HELP vllm:x X.\n# TYPE vllm:x gauge\nvllm:x 1.0\nkvplane_kappa 2\n") == ""


@pytest.mark.parametrize(
    "bad",
    [
        '# HELP kvplane_ring_x X.\n# TYPE kvplane_ring_x gauge\nkvplane_ring_x{a="1" 2\n',
        "# HELP kvplane_ring_x X.\n# TYPE kvplane_ring_x gauge\nkvplane_ring_x two\n",
        "# HELP kvplane_ring_x X.\n# TYPE kvplane_ring_x gauge\nkvplane_ring_y 2\n",
        "# HELP kvplane_ring_x X.\n# TYPE kvplane_ring_x gauge\n",
        "# HELP kvplane_ring_x X.\n# TYPE kvplane_ring_x counter\nkvplane_ring_x 2\n",
        "# HELP kvplane_ring_x X.\n# TYPE kvplane_ring_x summary\nkvplane_ring_x 2\n",
        "# HELP kvplane_ring_x X.\n# TYPE kvplane_ring_z gauge\nkvplane_ring_z 2\n",
        GOOD,
    ],
)
def test_a_family_that_is_not_well_formed_is_left_out_and_spoils_no_other(bad: str) -> None:
    good = GOOD.replace("members", "others")
    assert names(GOOD + bad + good) == ["kvplane_ring_members", "kvplane_ring_others"]


def test_more_lines_than_any_rank_has_are_not_passed_on() -> None:
    with pytest.raises(ValueError, match="more than any rank has"):
        passed_on.lines("kvplane_ring_x 1\n" * (passed_on.MOST_LINES + 1))
