"""The time that the paced engine gives its steps; that vLLM keeps to it is checked by each run of the benchmark."""

import pytest

from bench.engine.model import StepTime
from bench.engine.plugin import kvplane_pace
from bench.engine.real import PLUGIN, RealEngine, environment_of

PACE = {"base": 0.010, "per_prefill_token": 0.001, "per_decode": 0.0001}


def test_a_step_takes_its_base_its_prompts_and_its_outputs() -> None:
    assert kvplane_pace.seconds(PACE, [1, 1, 1]) == pytest.approx(0.0103)
    assert kvplane_pace.seconds(PACE, [40, 1]) == pytest.approx(0.0501)
    assert kvplane_pace.seconds(PACE, []) == 0


def test_a_pace_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(ValueError, match="A pace by context is not told to the plugin"):
        RealEngine(pace=StepTime(base=0.01, per_prefill_token=0.0, per_decode=0.0, per_context_token=1e-6))


def test_the_plugin_comes_before_what_else_is_wanted_on_the_path() -> None:
    pace = StepTime(base=0.01, per_prefill_token=0.001, per_decode=0.0001, per_context_token=0.0)
    assert environment_of(pace, path=None)["PYTHONPATH"] == str(PLUGIN)
    assert environment_of(pace, path="/one:/two")["PYTHONPATH"] == f"{PLUGIN}:/one:/two"
