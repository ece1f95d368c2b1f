"""Small models with random weights, made in code: one for each architecture that the ring is proved on."""

from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from tests.ring.proved import BASE, REFUSED, SERVED, VOCABULARY, Tiny

__all__ = ["REFUSED", "SERVED", "VOCABULARY", "Tiny", "build", "configure", "wrong"]

transformers.logging.set_verbosity_error()

_ROUNDING = 1e-4
"""Of the largest logit: what two computations of it may differ by."""


def configure(tiny: Tiny) -> Any:
    return AutoConfig.for_model(tiny.model_type, **{**BASE, **tiny.options})


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
