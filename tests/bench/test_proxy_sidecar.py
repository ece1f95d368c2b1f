"""The sidecar of the proxy's benchmark: configured as by the operator, ready when it decides, and refusing nobody."""

import asyncio
from pathlib import Path

import aiohttp
import pytest

from bench.engine.model import EngineConfig, StepTime
from bench.engine.server import SimulatedServer
from bench.proxy import contestants
from bench.proxy.__main__ import Size
from bench.proxy.sidecar import (
    MODEL,
    TPOT_MILLISECONDS,
    Sidecar,
    check_that_all_were_let_in,
    config,
    decisions,
)
from e2e.cluster.ports import free_ports
from kvplane_api.service import LLMServiceSpec
from kvplane_api.wire import SidecarConfig
from kvplane_operator.plan.children import sidecar_config

ENGINE = EngineConfig(num_gpu_blocks=17, block_size=4, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=60)
FAST = StepTime(base=0.0005, per_prefill_token=0.0, per_decode=0.0, per_context_token=0.0)
METRICS = """\
# TYPE kvplane_admission_decisions_total counter
kvplane_admission_decisions_total{decision="admitted",model_name="bench",reason=""} 5.0
kvplane_admission_decisions_total{decision="refused",model_name="bench",reason="kv"} 2.0
kvplane_admission_decisions_total{decision="refused",model_name="bench",reason="prefill"} 0.0
kvplane_admission_decisions_total{decision="would-refuse",model_name="bench",reason="kv"} 3.0
"""


def test_it_is_configured_as_by_the_operator() -> None:
    spec = LLMServiceSpec.model_validate(
        {"model": {"source": "hf://acme/tiny"}, "slo": {"tpotMilliseconds": TPOT_MILLISECONDS}}
    )
    assert config() == SidecarConfig.model_validate_json(sidecar_config(spec, MODEL, kv_events=False))
    assert config().admission.policy == "Enforce"


def test_the_load_is_well_within_the_promise() -> None:
    assert 2 * Size().interval_us <= 1000 * TPOT_MILLISECONDS


def test_refusals_are_told_by_reason() -> None:
    assert decisions(METRICS) == {"": 5, "kv": 2, "prefill": 0}
    with pytest.raises(RuntimeError, match=r"^Admission refused 2 requests \(kv: 2\) and let 5 in, and only"):
        check_that_all_were_let_in(decisions(METRICS))
    check_that_all_were_let_in({"": 5, "kv": 0})


def test_metrics_without_decisions_are_no_proof() -> None:
    with pytest.raises(RuntimeError, match="have no kvplane_admission_decisions_total"):
        decisions("kvplane_draining 0\n")


async def test_it_is_measured_once_it_decides_and_until_it_refuses(tmp_path: Path) -> None:
    async with SimulatedServer(config=ENGINE, step_time=FAST) as engine, aiohttp.ClientSession() as session:
        port = int(engine.url.rpartition(":")[2])
        sidecar = Sidecar(engine_port=port, admin_port=free_ports(1)[0], folder=tmp_path)
        contestant = contestants.kvplane(sidecar, tmp_path)

        async def ask(prompt_tokens: int) -> int:
            body = {"prompt": [7] * prompt_tokens, "max_tokens": 5, "ignore_eos": True}
            async with session.post(f"{contestant.url}/v1/completions", json=body) as answer:
                await answer.read()
                return answer.status

        try:
            await asyncio.to_thread(contestant.start)
            assert await ask(10) == 200
            await asyncio.to_thread(contestant.check)
            assert await ask(64) == 400
            with pytest.raises(RuntimeError, match="context-length: 1"):
                await asyncio.to_thread(contestant.check)
            assert 'reason="context-length"} 1.0' in "\n".join(await asyncio.to_thread(sidecar.admission_metrics))
        finally:
            contestant.stop()
