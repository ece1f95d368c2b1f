"""Engines on large accelerators: blocks and step times from published figures, for replays that no machine here could run.

A roofline (Williams et al. 2009): a step reads all weights and the KV of its context at the memory's bandwidth, and
computes 2 FLOP per parameter for each prompt token; tokens of decodes ride along with the weights, which holds up to
some hundreds of sequences. Efficiencies are shares of the data sheet's peak:

- bandwidth 0.77: Llama-3.1-8B on an A100 with vLLM 0.23 decodes one sequence at 77 % of what its memory allows
  (J. Musgrave, "vLLM throughput-latency sweep on NVIDIA A100", johnmusgrave.com);
- compute 0.5: an assumption; published times for prompts of 7-8 B models on an A100 are 43-61 % of 312 TFLOP/s
  ("The Utilization Paradox", huggingface.co/blog/atharv6f: 6.7 TFLOP in 35-50 ms).

Memory: the accelerator's x 0.92 (``gpu_memory_utilization`` of vLLM 0.32) less the weights and 2 GiB for activations
and CUDA graphs. Arguments are vLLM 0.32's defaults for an API server on that accelerator
(``vllm/engine/arg_utils.py``); ``max_model_len`` is set to what the traces need.

These are models of engines, not measurements: rankings of policies hold over a range of them, absolute values do not.
"""

from dataclasses import dataclass
from typing import Final

from bench.engine.model import EngineConfig, StepTime

BANDWIDTH_EFFICIENCY: Final = 0.77
COMPUTE_EFFICIENCY: Final = 0.5
MEMORY_UTILIZATION: Final = 0.92
ACTIVATION_BYTES: Final = 2 * 2**30
BLOCK_SIZE: Final = 16
BYTES_PER_VALUE: Final = 2
"""bfloat16, weights and KV."""
MAX_MODEL_LEN: Final = 16384


@dataclass(frozen=True)
class Model:
    """A model's size, from its config.json and its weights' index."""

    parameters: float
    layers: int
    kv_heads: int
    head_dim: int

    @property
    def kv_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * BYTES_PER_VALUE


@dataclass(frozen=True)
class Accelerator:
    """One device, from its data sheet."""

    memory_bytes: float
    bandwidth: float
    """Bytes per second."""
    flops: float
    """bfloat16, dense, per second."""
    max_num_seqs: int
    """vLLM's default there."""
    max_num_batched_tokens: int


LLAMA_3_1_8B: Final = Model(parameters=8.03e9, layers=32, kv_heads=8, head_dim=128)
"""meta-llama/Llama-3.1-8B, config.json."""
QWEN_2_5_32B: Final = Model(parameters=32.8e9, layers=64, kv_heads=8, head_dim=128)
"""Qwen/Qwen2.5-32B, config.json."""

A100_80GB: Final = Accelerator(
    memory_bytes=80 * 2**30, bandwidth=2.039e12, flops=312e12, max_num_seqs=256, max_num_batched_tokens=2048
)
"""NVIDIA A100 80GB SXM data sheet."""
H100_80GB: Final = Accelerator(
    memory_bytes=80 * 2**30, bandwidth=3.35e12, flops=989e12, max_num_seqs=1024, max_num_batched_tokens=8192
)
"""NVIDIA H100 80GB SXM data sheet."""


@dataclass(frozen=True)
class Preset:
    """All that the simulator needs."""

    name: str
    config: EngineConfig
    step_time: StepTime


def preset(name: str, model: Model, accelerator: Accelerator) -> Preset:
    """vLLM with one model on one accelerator."""
    weights = model.parameters * BYTES_PER_VALUE
    room = MEMORY_UTILIZATION * accelerator.memory_bytes - weights - ACTIVATION_BYTES
    bandwidth = BANDWIDTH_EFFICIENCY * accelerator.bandwidth
    return Preset(
        name=name,
        config=EngineConfig(
            num_gpu_blocks=int(room / (model.kv_bytes_per_token * BLOCK_SIZE)),
            block_size=BLOCK_SIZE,
            max_num_seqs=accelerator.max_num_seqs,
            max_num_batched_tokens=accelerator.max_num_batched_tokens,
            max_model_len=MAX_MODEL_LEN,
        ),
        step_time=StepTime(
            base=weights / bandwidth,
            per_prefill_token=2 * model.parameters / (COMPUTE_EFFICIENCY * accelerator.flops),
            per_decode=0.0,
            per_context_token=model.kv_bytes_per_token / bandwidth,
        ),
    )


PRESETS: Final = {
    each.name: each
    for each in (
        preset("8b-a100", LLAMA_3_1_8B, A100_80GB),
        preset("8b-h100", LLAMA_3_1_8B, H100_80GB),
        preset("32b-h100", QWEN_2_5_32B, H100_80GB),
    )
}
