"""Virtual clients of the simulated engine, the comparison's arithmetic, and the presets' arithmetic."""

import pytest

from bench.engine.load import Job, mixed
from bench.engine.model import EngineConfig, StepTime
from bench.engine.presets import PRESETS
from bench.engine.simulate import Run, simulate, usage_rmse

CONFIG = EngineConfig(num_gpu_blocks=9, block_size=4, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=32)
TENTH = StepTime(base=0.1, per_prefill_token=0.0, per_decode=0.0, per_context_token=0.0)


def test_times_are_those_of_a_client() -> None:
    run = simulate([Job(1.0, 4, 3), Job(5.0, 4, 1)], config=CONFIG, step_time=TENTH, frontend_seconds=0.04)
    assert run.ttft == (pytest.approx(0.14), pytest.approx(0.14))
    assert run.tpot == (pytest.approx(0.1),), "one token has no gap"
    assert run.usage_at(0.5) == 0.0
    assert run.usage_at(1.05) == 1 / 8
    assert run.seconds == pytest.approx(5.12)


def test_a_prefix_is_shared_by_its_number() -> None:
    jobs = [Job(0.0, 12, 1, prefix=1, prefix_tokens=8), Job(0.0, 12, 1, prefix=1, prefix_tokens=8)]
    priced = StepTime(base=0.0, per_prefill_token=0.01, per_decode=0.0, per_context_token=0.0)
    run = simulate(jobs, config=CONFIG, step_time=priced, frontend_seconds=0.0)
    assert run.seconds == pytest.approx(0.16), "12 tokens and the 4 that the second does not find"


def test_the_curves_are_compared_until_the_longer_ends() -> None:
    one = Run(ttft=(), tpot=(), preemptions=0, usage=((0.0, 1.0), (1.0, 0.0)), seconds=1.0)
    other = Run(ttft=(), tpot=(), preemptions=0, usage=((0.0, 1.0), (2.0, 0.0)), seconds=2.0)
    assert usage_rmse(one, one) == 0.0
    assert usage_rmse(one, other) == pytest.approx(0.5**0.5)


def test_a_load_is_its_seed() -> None:
    jobs = mixed(rate=10.0, seconds=20.0, seed=1, sharing=0.5)
    assert jobs == mixed(rate=10.0, seconds=20.0, seed=1, sharing=0.5)
    assert jobs != mixed(rate=10.0, seconds=20.0, seed=2, sharing=0.5)
    assert 150 < len(jobs) < 250
    shared = [job for job in jobs if job.prefix]
    assert 0.3 < len(shared) / len(jobs) < 0.7
    assert all(job.prompt_tokens > job.prefix_tokens for job in jobs)


@pytest.mark.parametrize(
    ("name", "tokens", "decode_ms"), [("8b-a100", 464_000, 10.2), ("8b-h100", 464_000, 6.2), ("32b-h100", 43_000, 25.4)]
)
def test_presets_have_the_size_that_their_figures_give(name: str, tokens: int, decode_ms: float) -> None:
    preset = PRESETS[name]
    assert (preset.config.num_gpu_blocks - 1) * preset.config.block_size == pytest.approx(tokens, rel=0.01)
    assert 1000 * preset.step_time.base == pytest.approx(decode_ms, abs=0.05)
