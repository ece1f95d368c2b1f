"""Which models the ring computes exactly, decided before their weights are loaded.

The ring takes the place of a model's attention and of nothing else. So a model must let its attention be replaced, keep no
other state between tokens, and want nothing of attention but a causal mask, a sliding window or sinks. What is not so would
not fail but answer wrongly, so it is refused, each reason with the words that users read. Some models are exact up to a
length only: their frequencies, or chunks of attention, change behind it. They are served up to there.

A configuration can hide what a model does; after loading, :mod:`~kvplane_runtime.ring.trial` proves the rest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from kvplane_runtime.ring import exchange
from kvplane_runtime.ring.kernel import CUDA_HEAD


class UnsupportedArchitectureError(Exception):
    """The ring cannot compute this model exactly; the message says why."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """What the engine has to know of a model."""

    model_type: str
    layers: int
    query_heads: int
    key_heads: int
    head_dim: int
    context_tokens: int
    """Longest sequence that is exact and that the model was made for."""

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.key_heads * self.head_dim * element_bytes

    def keys_per_query(self, element_bytes: int) -> float:
        """What a query that goes round sends, in keys with their values."""
        return exchange.keys_per_query(
            query_heads=self.query_heads,
            key_heads=self.key_heads,
            head_dim=self.head_dim,
            element_bytes=element_bytes,
        )


_LAYER_TYPES: Final = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
_FIXED_ROPE: Final = frozenset({"default", "linear", "llama3", "yarn", "proportional"})
"""Frequencies that do not depend on the length of a sequence."""
_VARYING_ROPE: Final = frozenset({"dynamic", "longrope"})
"""Frequencies that are the original ones up to the original length."""

Refusal = str | None


def _no_causal_model(config: PreTrainedConfig) -> Refusal:
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "it is no causal language model"
    return None


def _fixed_attention(config: PreTrainedConfig) -> Refusal:
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    classes = model if isinstance(model, tuple) else (model,)
    if not all(getattr(one, "_supports_attention_backend", False) for one in classes):
        return "its attention cannot be replaced: the model does not declare transformers' attention interface"
    return None


def _other_layers(config: PreTrainedConfig) -> Refusal:
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    return (
        f"it has layers of type {', '.join(others)}, which keep a state that is no keys and values" if others else None
    )


def _latent_attention(config: PreTrainedConfig) -> Refusal:
    if getattr(config, "kv_lora_rank", None) is not None:
        return "it has multi-head latent attention (kv_lora_rank), whose cache is not keys and values of one size"
    return None


def _softcap(config: PreTrainedConfig) -> Refusal:
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap is not None:
        return f"it caps attention logits (attn_logit_softcapping={cap:g}), which no kernel used here can"
    return None


def _shared_keys(config: PreTrainedConfig) -> Refusal:
    shared = getattr(config, "num_kv_shared_layers", None)
    return f"{shared} of its layers use other layers' keys and values (num_kv_shared_layers)" if shared else None


def _not_causal(config: PreTrainedConfig) -> Refusal:
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", None):
        return "its attention is not causal"
    return None


def _alibi(config: PreTrainedConfig) -> Refusal:
    return "it adds a bias by distance to attention logits (alibi)" if getattr(config, "alibi", False) else None


def _ropes(config: PreTrainedConfig) -> list[Mapping[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return nested or [parameters]


def _unknown_rope(config: PreTrainedConfig) -> Refusal:
    for rope in _ropes(config):
        kind = rope.get("rope_type", "default")
        if kind not in _FIXED_ROPE | _VARYING_ROPE:
            return f"its rotary embedding is of type {kind}, which is not known to depend on the position alone"
        if "mrope_section" in rope:
            return "its rotary embedding takes three positions for each token (mrope_section)"
    return None


_TEXT_CHECKS: Final[tuple[Callable[[PreTrainedConfig], Refusal], ...]] = (
    _other_layers,
    _latent_attention,
    _softcap,
    _shared_keys,
    _not_causal,
    _alibi,
    _unknown_rope,
)


def examine(config: PreTrainedConfig) -> Architecture:
    """What the engine has to know of the model with this configuration; raises UnsupportedArchitectureError."""
    text = config.get_text_config()
    refusal = _no_causal_model(config)
    for check in _TEXT_CHECKS:
        refusal = refusal or check(text)
    refusal = refusal or _fixed_attention(config)
    if refusal is not None:
        raise UnsupportedArchitectureError(f"The ring does not serve models of type {config.model_type}: {refusal}.")
    heads = text.num_attention_heads
    return Architecture(
        model_type=config.model_type,
        layers=text.num_hidden_layers,
        query_heads=heads,
        key_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        context_tokens=_context(text),
    )


def examine_device(architecture: Architecture, device: str) -> None:
    """Raises UnsupportedArchitectureError where the kernels of this kind of device do not take the model."""
    if device == "cuda" and architecture.head_dim % CUDA_HEAD:
        raise UnsupportedArchitectureError(
            f"The ring does not serve models of type {architecture.model_type} on GPUs where a head has "
            f"{architecture.head_dim} numbers: their kernels take multiples of {CUDA_HEAD}."
        )


def _context(config: PreTrainedConfig) -> int:
    bounds = [config.max_position_embeddings]
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        bounds.append(config.attention_chunk_size)
    if getattr(config, "attn_temperature_tuning", None):
        # It scales queries from position floor_scale - 1 on, and counts positions in the cache: that of the ring has none.
        bounds.append(config.floor_scale - 1)
    for rope in _ropes(config):
        if rope.get("rope_type") in _VARYING_ROPE:
            original = rope.get("original_max_position_embeddings")
            bounds.append(original or config.max_position_embeddings)
    return int(min(bounds))
