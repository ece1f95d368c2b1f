"""Attention of one block, with the logarithm of its softmax denominator, for each kind of device.

``block`` is the one place that knows a device's kernel. What they have in common is made the same here: grouped queries
without repeated keys, a natural logarithm in fp32, and minus infinity for a query that sees nothing.

CPU: ``aten::_scaled_dot_product_flash_attention_for_cpu``. Its causal mask begins at the top left, and for a row that sees
nothing it says 0, which a merge would take for a weight of one.

CUDA: ``aten::_scaled_dot_product_flash_attention`` for half precision, and matrix products where that kernel cannot serve
(fp32, masks). No machine with a GPU has run this path yet.
"""

from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

NOTHING: Final = float("-inf")
"""The lse of a query that sees no key."""

Partial = tuple[Tensor, Tensor]
"""Output [B, Hq, L, D] in the queries' type, and lse [B, Hq, L] in fp32."""


@dataclass(frozen=True, slots=True)
class Mask:
    """Who sees whom, made once and used in every layer."""

    bias: Tensor
    """[L, S]: 0 or minus infinity, in the queries' type."""
    blind: Tensor | None
    """[L]: queries that see nothing; None if all see something."""


def mask(visible: Tensor, dtype: torch.dtype) -> Mask:
    """The mask of ``visible`` [L, S], True where a query sees a key."""
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, NOTHING)
    blind = ~visible.any(-1)
    return Mask(bias, blind if bool(blind.any()) else None)


def block(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, causal: bool = False, bias: Mask | None = None
) -> Partial:
    """Attention of ``query`` [B, Hq, L, D] over ``key`` and ``value`` [B, Hk, S, D], Hq a multiple of Hk.

    ``causal``: query i sees keys 0 to i, and L equals S. ``scale`` multiplies the products.
    """
    if key.shape[2] == 0 or query.shape[2] == 0:
        return torch.zeros_like(query), query.new_full(query.shape[:3], NOTHING, dtype=torch.float32)
    kernel = _KERNELS[query.device.type]
    out, lse = kernel(query, key, value, scale=scale, causal=causal, bias=None if bias is None else bias.bias)
    if bias is not None and bias.blind is not None:
        lse = lse.masked_fill(bias.blind, NOTHING)
    return out, lse


def _cpu(query: Tensor, key: Tensor, value: Tensor, *, scale: float, causal: bool, bias: Tensor | None) -> Partial:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=bias, scale=scale
    )
    return out, lse


def _cuda(query: Tensor, key: Tensor, value: Tensor, *, scale: float, causal: bool, bias: Tensor | None) -> Partial:
    if bias is None and query.dtype in (torch.float16, torch.bfloat16):
        found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
        return found[0], found[1]
    return products(query, key, value, scale=scale, causal=causal, bias=bias)


def products(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, causal: bool = False, bias: Tensor | None = None
) -> Partial:
    """The definition, with [B, Hq, L, S] scores in memory: for any device, and what tests hold the kernels against."""
    batch, heads, rows, size = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, rows, size)
    scores = (grouped @ key.unsqueeze(2).transpose(-1, -2)).float() * scale
    if causal:
        rows_see = torch.ones(rows, key.shape[2], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~rows_see, NOTHING)
    if bias is not None:
        scores = scores + bias.float()
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).nan_to_num_(0.0)
    out = weights.to(value.dtype) @ value.unsqueeze(2)
    return out.reshape(query.shape), lse.reshape(batch, heads, rows)


class _Kernel(Protocol):
    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float, causal: bool, bias: Tensor | None
    ) -> Partial: ...


_KERNELS: Final[dict[str, _Kernel]] = {"cpu": _cpu, "cuda": _cuda}
