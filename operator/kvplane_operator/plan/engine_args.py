"""The engine's command line, from the spec. Flag names are vLLM's (0.32)."""

import json
from decimal import Decimal

from kvplane_api import names
from kvplane_api.service import Engine, LLMServiceSpec, Speculative
from kvplane_operator.plan import quantities, sources

COMMAND = ("vllm", "serve")

SHUTDOWN_SECONDS = 10
"""vLLM's own wait for requests in flight at TERM: a second net below the sidecar's drain, inside the 15 s margin."""

KV_EVENTS_FLAG = "--kv-events-config"

_SPECULATIVE_METHOD = {"Ngram": "ngram", "Draft": "draft_model", "Eagle3": "eagle3"}


def engine_args(spec: LLMServiceSpec, *, served_name: str) -> list[str]:
    """Arguments of the engine container, the spec's own fields first and ``extraArgs`` last."""
    engine = spec.engine
    args = [
        *sources.render(spec.model).args,
        "--served-model-name",
        served_name,
        # Loopback only: admission, metrics and drain count on every request passing the sidecar.
        "--host",
        "127.0.0.1",
        "--port",
        str(names.PORT_ENGINE),
        "--dtype",
        engine.dtype,
        "--kv-cache-dtype",
        engine.kv_cache_dtype,
        "--tensor-parallel-size",
        str(engine.tensor_parallel_size),
        "--gpu-memory-utilization",
        f"0.{engine.gpu_memory_percent:02d}",
        "--max-model-len",
        str(spec.context.max_tokens or "auto"),
        "--enable-prefix-caching" if engine.prefix_caching == "Enabled" else "--no-enable-prefix-caching",
        "--shutdown-timeout",
        str(SHUTDOWN_SECONDS),
        # The sidecar asks for health and metrics each second; a log line for each buries the engine's own.
        "--disable-uvicorn-access-log",
    ]
    args += _optional(engine)
    if publishes_kv_events(engine):
        args += [KV_EVENTS_FLAG, _json(_KV_EVENTS)]
    args += engine.extra_args or ()
    return args


def publishes_kv_events(engine: Engine) -> bool:
    """Whether the engine is told to publish its KV events.

    Without prefix caching there are none (vllm/config/vllm.py warns of it), and with data parallelism, which only
    extraArgs can ask for, the second rank refuses ipc endpoints (offset_endpoint_port in
    vllm/distributed/kv_events.py) and the engine would not start.
    """
    ranks = any(arg.replace("_", "-").startswith(("--data-parallel", "-dp")) for arg in engine.extra_args or ())
    return engine.prefix_caching == "Enabled" and not ranks


_KV_EVENTS = {
    "enable_kv_cache_events": True,
    "publisher": "zmq",
    "endpoint": names.KV_EVENTS_ENDPOINT,
    "replay_endpoint": names.KV_REPLAY_ENDPOINT,
}
"""vLLM binds ipc endpoints, so that it never waits for the sidecar; what nobody reads is dropped."""


def _optional(engine: Engine) -> list[str]:
    args: list[str] = []
    if engine.block_size is not None:
        args += ["--block-size", str(engine.block_size)]
    if engine.max_batched_tokens is not None:
        args += ["--max-num-batched-tokens", str(engine.max_batched_tokens)]
    if engine.max_sequences is not None:
        args += ["--max-num-seqs", str(engine.max_sequences)]
    if engine.speculative is not None:
        args += ["--speculative-config", _json(_speculative(engine.speculative))]
    if engine.kv_offload is not None:
        gibibytes = quantities.parse(engine.kv_offload.cpu_memory) / Decimal(2**30)
        args += ["--kv-offloading-size", f"{gibibytes.normalize():f}", "--kv-offloading-backend", "native"]
    if engine.kv_transfer is not None:
        args += ["--kv-transfer-config", _json(engine.kv_transfer)]
    return args


def _speculative(speculative: Speculative) -> dict[str, object]:
    config: dict[str, object] = {
        "method": _SPECULATIVE_METHOD[speculative.method],
        "num_speculative_tokens": speculative.tokens,
    }
    if speculative.model is not None:
        config["model"] = speculative.model
    return config


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)
