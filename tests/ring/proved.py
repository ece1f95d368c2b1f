"""The architectures that the ring is proved on, each as a small model; the list that the tests run and that the docs show.

Plain values, without torch: the page of the docs is made from them (scripts/generate.py).
"""

from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 384
RANKS = (2, 3, 4)
BOUND = 5e-5
"""Largest error of a logit, of the largest logit or of 1."""


@dataclass(frozen=True)
class Tiny:
    """An architecture with what makes it small, or makes it this variant."""

    name: str
    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    reference: str = "sdpa"
    """The attention that the unsharded model runs with."""


BASE: dict[str, Any] = {
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


def served() -> dict[str, list[str]]:
    """By model type, what distinguishes its models; nothing of one that is as it comes."""
    found: dict[str, list[str]] = {}
    for tiny in SERVED:
        _, _, variant = tiny.name.partition(", ")
        what = [variant] if variant else []
        if tiny.options.get("sliding_window") and "sliding window" not in what:
            what.append("sliding window")
        found.setdefault(tiny.model_type, []).append(", ".join(what))
    return found


def refused() -> dict[str, str]:
    """By model type, the reason."""
    return {tiny.model_type: reason for tiny, reason in REFUSED}
