"""Partial attention results into one, exactly.

With outputs o_i and lse_i over disjoint keys, o = sum(o_i exp(lse_i - lse)) with lse = log(sum(exp(lse_i))) is attention
over all of them (online softmax, arXiv 1805.02867; used blockwise in FlashAttention and in Ring Attention, arXiv
2310.01889). Everything here is fp32 and in the order given, never a reduction whose order the network chooses, so that all
ranks get the same bits. A block that sees nothing has the lse minus infinity; two such blocks are again one.

Attention sinks (gpt-oss) are one more term exp(sink) of the denominator alone: out x sigmoid(lse - sink), once, at the end.
"""

import torch
from torch import Tensor

from kvplane_runtime.ring.kernel import NOTHING, Partial


class Running:
    """What the blocks computed so far amount to, for queries [B, Hq, L, D]."""

    def __init__(self, query: Tensor) -> None:
        self._shape = query.shape
        self._device = query.device
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def add(self, partial: Partial, *, begin: int = 0, end: int | None = None) -> None:
        """Takes in a block of the queries ``begin`` to before ``end`` (all). The first one's tensors become its own."""
        out, lse = partial
        end = self._shape[2] if end is None else end
        if self._out is None or self._lse is None:
            if begin == 0 and end == self._shape[2]:
                self._out, self._lse = out.float(), lse
                return
            self._out = torch.zeros(self._shape, dtype=torch.float32, device=self._device)
            self._lse = torch.full(self._shape[:3], NOTHING, device=self._device)
            self._out[:, :, begin:end], self._lse[:, :, begin:end] = out, lse
            return
        so_far, lse_so_far = self._out[:, :, begin:end], self._lse[:, :, begin:end]
        # The naive form is exp(lse) / (exp(lse) + exp(lse_so_far)), which overflows.
        share = torch.sigmoid(lse - lse_so_far).nan_to_num_(0.0)
        so_far.lerp_(out.float(), share.unsqueeze(-1))
        lse_so_far.copy_(torch.logaddexp(lse_so_far, lse))

    def partial(self) -> Partial:
        """Output and lse in fp32; zeros and minus infinity for queries that saw nothing."""
        if self._out is None or self._lse is None:
            return (
                torch.zeros(self._shape, dtype=torch.float32, device=self._device),
                torch.full(self._shape[:3], NOTHING, device=self._device),
            )
        return self._out, self._lse


def combine(outs: Tensor, lses: Tensor) -> Partial:
    """The partial results ``outs`` [N, ..., D] and ``lses`` [N, ...] of N ranks, in fp32, as one."""
    highest = lses.amax(0)
    weights = torch.exp(lses - highest).nan_to_num_(0.0)
    total = weights.sum(0)
    out = (weights.unsqueeze(-1) * outs).sum(0) / total.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return out, highest + total.log()


def with_sinks(partial: Partial, sinks: Tensor) -> Tensor:
    """The output [B, Hq, L, D] with one sink logit for each head, [Hq], in the denominator."""
    out, lse = partial
    return out * torch.sigmoid(lse - sinks.float().view(1, -1, 1)).unsqueeze(-1)
