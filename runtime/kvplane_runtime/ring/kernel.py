"""Attention of one block, with the logarithm of its softmax denominator, for each kind of device.

``block`` is the one place that knows a device's kernel. What they have in common is made the same here: grouped queries
without repeated keys, a natural logarithm in fp32, and minus infinity for a query that sees nothing.

CPU: ``aten::_scaled_dot_product_flash_attention_for_cpu``. Its causal mask begins at the top left, and for a row that sees
nothing it says 0, which a merge would take for a weight of one.

CUDA: ``aten::_scaled_dot_product_flash_attention`` in half precision, and ``aten::_scaled_dot_product_efficient_attention``
for what that one does not know: fp32 and masks. The latter knows no grouped queries either, so a key head and its group
become one entry of the batch; its lse is padded, and 0 for a row that sees nothing. No GPU has run this path yet.
"""

from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

NOTHING: Final = float("-inf")
"""The lse of a query that sees no key."""
CUDA_CAPABILITY: Final = (8, 0)
"""Least compute capability of a GPU: both of its kernels have bfloat16 from there on."""
CUDA_HEAD: Final = 8
"""Sizes of heads that a GPU takes are multiples of this: its kernels read 16 bytes at a time."""
_FLASH_HEAD: Final = 256
"""Largest head of the flash kernel."""

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
    rows, columns = visible.shape
    unit = CUDA_HEAD if visible.is_cuda else 1  # each row begins where 16 bytes do
    bias = torch.zeros((rows, -(-columns // unit) * unit), dtype=dtype, device=visible.device)[:, :columns]
    bias.masked_fill_(~visible, NOTHING)
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
    if bias is None and query.dtype != torch.float32 and query.shape[3] <= _FLASH_HEAD:
        found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
        return found[0], found[1]
    return _cuda_efficient(query, key, value, scale=scale, causal=causal, bias=bias)


def _cuda_efficient(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, causal: bool, bias: Tensor | None
) -> Partial:
    batch, heads, rows, size = query.shape
    shown, columns = key.shape[1:3]
    entries, group = batch * shown, heads // shown
    keys, values = (
        each.reshape(entries, 1, columns, size).expand(entries, group, columns, size) for each in (key, value)
    )
    found = torch.ops.aten._scaled_dot_product_efficient_attention(
        query.reshape(entries, group, rows, size),
        keys,
        values,
        None if bias is None else bias.expand(entries, group, rows, columns),
        True,
        0.0,
        causal,
        scale=scale,
    )
    return found[0].reshape(query.shape), found[1][:, :, :rows].reshape(batch, heads, rows)


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
