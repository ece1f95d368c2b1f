"""Small models with random weights, made in code: one for each architecture that the ring is proved on."""

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

transformers.logging.set_verbosity_error()

VOCABULARY = 384
_ROUNDING = 1e-4
"""Of the largest logit: what two computations of it may differ by."""


@dataclass(frozen=True)
class Tiny:
    """An architecture with what makes it small, or makes it this variant."""

    name: str
    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    reference: str = "sdpa"
    """The attention that the unsharded model runs with."""


_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
_SLIDING = {"sliding_window": 40}

SERVED = (
    Tiny("llama", "llama"),
    Tiny("llama, 5 query heads for each key head", "llama", {"hidden_size": 160, "num_attention_heads": 10}),
    Tiny("qwen2", "qwen2"),
    Tiny("qwen3", "qwen3"),
    Tiny("qwen2_moe", "qwen2_moe", {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 64}),
    Tiny("qwen3_moe", "qwen3_moe", {**_EXPERTS, "num_experts": 4}),
    Tiny("mistral", "mistral", {"sliding_window": None}),
    Tiny("mistral, sliding window", "mistral", _SLIDING),
    Tiny("mixtral", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    Tiny("ministral", "ministral", _SLIDING),
    Tiny("gemma", "gemma"),
    Tiny("gemma2, no softcap", "gemma2", {**_SLIDING, "attn_logit_softcapping": None, "query_pre_attn_scalar": 16}),
    Tiny("gemma3_text", "gemma3_text", {**_SLIDING, "query_pre_attn_scalar": 16, "num_hidden_layers": 6}),
    Tiny("phi3", "phi3"),
    Tiny("olmo", "olmo"),
    Tiny("olmo2", "olmo2"),
    Tiny("olmo3", "olmo3", {**_SLIDING, "num_hidden_layers": 4}),
    Tiny("exaone4", "exaone4", {**_SLIDING, "num_hidden_layers": 4}),
    Tiny("smollm3", "smollm3", {"num_hidden_layers": 4}),
    Tiny("granite", "granite"),
    Tiny("cohere", "cohere"),
    Tiny("cohere2", "cohere2", {**_SLIDING, "num_hidden_layers": 4}),
    Tiny("glm", "glm"),
    Tiny("glm4", "glm4"),
    Tiny("starcoder2", "starcoder2", _SLIDING),
    Tiny("seed_oss", "seed_oss"),
    Tiny(
        "llama4_text, within its chunk",
        "llama4_text",
        {"intermediate_size_mlp": 256, "num_local_experts": 2, "attention_chunk_size": 4096, "moe_layers": []},
    ),
    Tiny(
        "gpt_oss, sinks", "gpt_oss", {**_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2}, reference="eager"
    ),
    Tiny("helium", "helium"),
    Tiny("ernie4_5", "ernie4_5"),
    Tiny("hunyuan_v1_dense", "hunyuan_v1_dense"),
    Tiny("arcee", "arcee"),
    Tiny("apertus", "apertus"),
    Tiny("granitemoe", "granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Tiny("gpt_neox", "gpt_neox"),
    Tiny("gpt2, learned positions", "gpt2", {"n_positions": 4096}),
    Tiny(
        "llama, llama3 frequencies",
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            }
        },
    ),
    Tiny(
        "qwen3, yarn frequencies",
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
            }
        },
    ),
)

REFUSED = (
    (Tiny("gemma2", "gemma2"), "it caps attention logits (attn_logit_softcapping=50)"),
    (Tiny("deepseek_v3", "deepseek_v3"), "multi-head latent attention"),
    (Tiny("qwen3_next", "qwen3_next"), "layers of type linear_attention"),
    (Tiny("bloom", "bloom"), "its attention cannot be replaced"),
    (Tiny("t5", "t5"), "it is no causal language model"),
    (Tiny("mamba", "mamba"), "layers of type linear_attention"),
)


def configure(tiny: Tiny) -> Any:
    return AutoConfig.for_model(tiny.model_type, **{**_BASE, **tiny.options})


def build(tiny: Tiny) -> Any:
    """The model in fp32. Queries and keys are drawn large enough that attention is far from flat."""
    config = configure(tiny)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=tiny.reference)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                sharp = any(part in name for part in ("q_proj", "k_proj", "qkv", "c_attn", "query_key_value"))
                parameter.copy_(drawn * (2.0 if sharp else 1.0) / parameter.shape[-1] ** 0.5)
            elif "bias" in name or "sinks" in name:
                parameter.copy_(drawn * 0.1)
    return model.eval().requires_grad_(False)


def wrong(model: Any, prompt: list[int], tokens: list[int]) -> list[int]:
    """Indices of the greedy ``tokens`` that the unsharded model would not have chosen after those before.

    Where two tokens are as close to each other as rounding is large, either is right.
    """
    if not tokens:
        return []
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1 :]
    chosen = logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    behind = logits.amax(-1) - chosen
    found: list[int] = (behind > _ROUNDING * max(1.0, float(logits.abs().max()))).nonzero().flatten().tolist()
    return found
