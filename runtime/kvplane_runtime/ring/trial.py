"""Proves on a loaded model that the ring may compute it: its tokens must meet in attention and nowhere else.

A few tokens are run twice. First as the model does it by itself. Then in reverse order, with their positions, and with the
ring's attention function, which here computes by the definition from positions alone. Both must give the same logits. A
model that mixes neighbouring tokens outside of attention, takes a position from the order, keeps state elsewhere, or wants
of attention what the ring does not know, does not.
"""

from typing import Any, Final

import torch
from torch import Tensor

from kvplane_runtime.ring.architectures import Architecture, UnsupportedArchitectureError
from kvplane_runtime.ring.attention import NAME
from kvplane_runtime.ring.cache import RingCache
from kvplane_runtime.ring.kernel import mask, products
from kvplane_runtime.ring.merge import with_sinks

_TOKENS: Final = 12
TOLERANCE: Final = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.2}
"""By data type that the ring computes in, of the largest logit. What is wrong by construction is off by more than the logits'
own size."""


class _Reversed:
    """A pass over all tokens of a sequence in one go, by position."""

    def __init__(self, positions: Tensor) -> None:
        self._positions = positions
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}
        self.windows: dict[int, int | None] = {}
        """By layer, its sliding window, once it has asked for attention."""

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        self._stored[layer] = key, value

    def attend(self, layer: int, query: Tensor, *, scale: float, window: int | None, sinks: Tensor | None) -> Tensor:
        if layer not in self._stored or layer in self.windows:
            raise UnsupportedArchitectureError(
                f"Layer {layer} does not store its keys and values once and then attend once."
            )
        self.windows[layer] = window
        key, value = self._stored[layer]
        back = self._positions[:, None] - self._positions[None, :]
        visible = (back >= 0) & (back < (window or _TOKENS))
        partial = products(query, key, value, scale=scale, bias=mask(visible, query.dtype).bias)
        out = partial[0] if sinks is None else with_sinks(partial, sinks)
        return out.to(query.dtype).transpose(1, 2).contiguous()


def prove(model: Any, architecture: Architecture) -> None:
    """Raises UnsupportedArchitectureError if the ring would compute ``model`` wrongly. Leaves it with the ring's attention."""
    kind = architecture.model_type
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (1, _TOKENS), generator=generator).to(device)
    with torch.inference_mode():
        model.set_attn_implementation("eager")
        expected = model(tokens, use_cache=False, logits_to_keep=1).logits[0, -1].float()
        model.set_attn_implementation(NAME)
        positions = torch.arange(_TOKENS - 1, -1, -1, device=device)
        run = _Reversed(positions)
        first = torch.zeros(1, dtype=torch.long, device=device)
        found = (
            model(
                tokens.flip(1),
                position_ids=positions[None],
                past_key_values=RingCache(architecture.layers, run.store),
                use_cache=True,
                logits_to_keep=first,
                ring=run,
            )
            .logits[0, -1]
            .float()
        )
    if len(run.windows) != architecture.layers:
        raise UnsupportedArchitectureError(
            f"The ring does not serve models of type {kind}: "
            f"{architecture.layers - len(run.windows)} of its {architecture.layers} layers have no attention."
        )
    _check_windows(model.config.get_text_config(), run.windows, kind)
    bound = TOLERANCE[model.dtype] * max(1.0, float(expected.abs().max()))
    error = float((found - expected).abs().max())
    if not error <= bound:
        raise UnsupportedArchitectureError(
            f"The ring does not serve models of type {kind}: its logits depend on more than each token's position "
            f"and attention (they differ by {error:.3g} where {bound:.3g} would be rounding)."
        )


def _check_windows(config: Any, windows: dict[int, int | None], kind: str) -> None:
    """A model that cuts its windows by a mask alone would get none here."""
    types = getattr(config, "layer_types", None)
    if types is None:
        sliding = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
        types = ["sliding_attention" if sliding else "full_attention"] * len(windows)
    for layer, window in sorted(windows.items()):
        if (types[layer] == "sliding_attention") != (window is not None):
            raise UnsupportedArchitectureError(
                f"The ring does not serve models of type {kind}: layer {layer} is of type {types[layer]} "
                f"and tells its attention a sliding window of {window}."
            )
