"""The next token from the logits, on rank 0: greedy, or drawn from what temperature, top-k and top-p leave.

A draw depends on the logits, the seed, the output's number and the token's number only, not on what else is in the batch
and not on any earlier draw: so a request gives the same tokens again after a lost rank, whatever was sampled in between.
The random numbers are Philox's with (seed, output) as its key and the token's number as its counter (Salmon et al. 2011).

Log probabilities are those of the model: of the logits as they came, before temperature and cuts, as in vLLM's default.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]

MAX_LOGPROBS: Final = 20
"""Most alternatives reported for a token, OpenAI's bound."""
_WORD: Final = 2**64


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 1.0
    """0: greedy, the highest logit, and the lowest id among equals."""
    top_p: float = 1.0
    """Only the likeliest tokens whose probabilities first sum to this; 1: all."""
    top_k: int = 0
    """Only so many likeliest tokens; 0: all."""
    seed: int = 0
    logprobs: int | None = None
    """Log probability of the token, and of so many likeliest ones; None: neither."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to choose: which row of the logits, and for whom."""

    row: int
    sequence: int
    sampling: Sampling
    output: int
    """Number of the output within its request; each has random numbers of its own."""
    index: int
    """Number of the token within its output, from 0."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with their log probabilities, likeliest first, lowest id first among equals."""


class NotFiniteError(Exception):
    """Logits hold NaN or only -inf: the model or the ring computed nonsense, and any token would be a wrong one."""


def sample(logits: Logits, draw: Draw) -> Sampled:
    """The token of a draw; ``logits`` are [rows, vocabulary], float32. Raises NotFiniteError."""
    row = logits[draw.row]
    best = int(np.argmax(row))  # the first of equals; NaN counts as the highest
    if not np.isfinite(row[best]):
        raise NotFiniteError(
            f"The logits of sequence {draw.sequence} have {row[best]} as their highest; no token can be chosen from them."
        )
    sampling = draw.sampling
    token = best if sampling.temperature == 0 else _drawn(row, draw)
    if sampling.logprobs is None:
        return Sampled(token)
    scores = row.astype(np.float64)
    logprobs = scores - _log_sum_exp(scores)
    top = _likeliest(row, sampling.logprobs)
    return Sampled(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in top))


def _drawn(row: Logits, draw: Draw) -> int:
    sampling = draw.sampling
    # In order of ids unless top-p needs another: the order does not matter, only that it is always the same one.
    ids = np.arange(row.size)
    if sampling.top_k and sampling.top_k < row.size:
        ids = _likeliest(row, sampling.top_k)
    elif sampling.top_p < 1:
        ids = np.argsort(-row, kind="stable")
    scores = row[ids].astype(np.float64)
    scores = (scores - scores.max()) / sampling.temperature
    cumulative = np.cumsum(np.exp(scores))
    if sampling.top_p < 1:
        last = int(np.searchsorted(cumulative, sampling.top_p * cumulative[-1]))
        cumulative = cumulative[: last + 1]
    point = _uniform(draw) * cumulative[-1]
    chosen = min(int(np.searchsorted(cumulative, point, side="right")), cumulative.size - 1)
    return int(ids[chosen])


def _likeliest(row: Logits, count: int) -> npt.NDArray[np.intp]:
    """Ids of the ``count`` highest logits, highest first, the lowest id first among equals."""
    if count <= 0:
        return np.empty(0, dtype=np.intp)
    if count >= row.size:
        return np.argsort(-row, kind="stable")
    least = np.partition(row, row.size - count)[row.size - count]
    above = np.flatnonzero(row > least)
    equal = np.flatnonzero(row == least)[: count - above.size]
    ids = np.concatenate((above, equal))
    return ids[np.lexsort((ids, -row[ids]))]


def _log_sum_exp(scores: npt.NDArray[np.float64]) -> float:
    highest = scores.max()
    return float(highest + np.log(np.exp(scores - highest).sum()))


def _uniform(draw: Draw) -> float:
    """In [0, 1)."""
    key = np.array([draw.sampling.seed % _WORD, draw.output], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=draw.index)).random())
