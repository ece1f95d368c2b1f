"""How long outputs get: survival curves learned from requests that ended.

An output that stopped because it reached ``max_tokens`` says only that it would have been at least that long. Such a
sample is *censored*, and the curve is Kaplan and Meier's product-limit estimator (JASA 53, 1958), which takes both kinds:
where every request runs into its ``max_tokens`` the curve never falls, and each request is expected to run into its own.

Prompt and output lengths are hardly correlated within one kind of traffic, but kinds of traffic differ in both; so there
is a curve for each (priority class, power of two of the prompt), and one over all for those that have seen too little.
"""

import math
from bisect import bisect_right
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Final

_PRIOR_TOKENS: Final = 512.0
"""Expected output before anything is known; it weighs as much as one sample. Longer than most: a new pod that waits a
moment for its first outputs to end costs less than one that begins by preempting."""
_BUCKET_SAMPLES: Final = 600
_ALL_SAMPLES: Final = 1500
_ENOUGH: Final = 30
"""Samples from which on a bucket has a curve of its own."""
_DRAWN: Final = 10
"""Samples from which a step curve is drawn: an exponential's tail takes much more room than most outputs ever need."""
_RENEW: Final = 16
"""A curve is drawn anew when its samples have grown by this share of 1/16, or by this many."""
_HIGHEST_TAIL_RATE: Final = 1 / 16
"""An output that has outlived every sample is expected to go on for at least 16 tokens."""
_BUCKETS: Final = 64
"""Buckets remembered; the one unused for longest is forgotten first."""


@dataclass(frozen=True, slots=True)
class Curve:
    """P(output > x) for x in tokens: a step function up to the longest sample, exponential beyond."""

    ends: tuple[int, ...] = ()
    """Lengths at which outputs ended by themselves, ascending, each once."""
    after: tuple[float, ...] = (1.0,)
    """P(output > x) for x below ``ends[0]``, then from each of ``ends`` on."""
    area: tuple[float, ...] = (0.0,)
    """Integral of P from 0 to the beginning of each step of ``after``."""
    longest: int = 0
    """Where the tail begins."""
    tail_rate: float = 1 / _PRIOR_TOKENS
    """Ends per token beyond ``longest``."""

    def exceeds(self, length: float) -> float:
        """P(output > length)."""
        share = self.after[bisect_right(self.ends, length)]
        if length > self.longest:
            share *= math.exp(-min(600.0, (length - self.longest) * self.tail_rate))
        return share

    def expected(self, limit: int | None) -> float:
        """Mean output in tokens where none may exceed ``limit``; at least 1."""
        return max(1.0, self._area(limit))

    def remaining(self, generated: int, limit: int | None) -> float:
        """Mean tokens still to come of an output that has ``generated`` and may not exceed ``limit``; at least 1."""
        if generated < self.longest:
            return max(1.0, (self._area(limit) - self._area(generated)) / self.exceeds(generated))
        return max(1.0, self._tail(generated, limit))

    def _area(self, limit: int | None) -> float:
        """Integral of P from 0 to ``limit``."""
        body = self.longest if limit is None else min(limit, self.longest)
        step = bisect_right(self.ends, body)
        start = self.ends[step - 1] if step else 0
        area = self.area[step] + self.after[step] * (body - start)
        return area + self.after[-1] * self._tail(self.longest, limit)

    def _tail(self, generated: int, limit: int | None) -> float:
        """Mean tokens beyond ``generated``, where that is in the tail, of an output that gets so long."""
        beyond = math.inf if limit is None else max(0, limit - generated)
        return -math.expm1(-beyond * self.tail_rate) / self.tail_rate


class OutputLengths:
    """Recent output lengths and the curves drawn from them. Bounded memory."""

    def __init__(self) -> None:
        self._all = _Samples(_ALL_SAMPLES)
        self._buckets: OrderedDict[tuple[int, int], _Samples] = OrderedDict()

    def __len__(self) -> int:
        """Samples remembered."""
        return len(self._all) + sum(len(bucket) for bucket in self._buckets.values())

    def curve(self, *, priority: int, prompt_tokens: int) -> Curve:
        """The curve of the request's bucket; that of all while the bucket has fewer than 30 samples."""
        bucket = self._buckets.get((priority, prompt_tokens.bit_length()))
        return (self._all if bucket is None or len(bucket) < _ENOUGH else bucket).curve()

    def learn(self, *, priority: int, prompt_tokens: int, output_tokens: int, capped: bool) -> None:
        """Takes in an output that ended; ``capped``: because it reached its ``max_tokens``."""
        key = (priority, prompt_tokens.bit_length())
        bucket = self._buckets.setdefault(key, _Samples(_BUCKET_SAMPLES))
        self._buckets.move_to_end(key)
        if len(self._buckets) > _BUCKETS:
            self._buckets.popitem(last=False)
        bucket.add(output_tokens, capped=capped)
        self._all.add(output_tokens, capped=capped)


class _Samples:
    """The newest lengths of one bucket, and the curve as it was when last drawn."""

    def __init__(self, most: int) -> None:
        self._lengths: deque[tuple[int, bool]] = deque(maxlen=most)
        self._curve = Curve()
        self._new = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, length: int, *, capped: bool) -> None:
        self._lengths.append((length, capped))
        self._new += 1

    def curve(self) -> Curve:
        if self._new * _RENEW >= min(len(self._lengths), _RENEW * _RENEW) and self._new:
            self._curve = draw(self._lengths)
            self._new = 0
        return self._curve


def draw(samples: "deque[tuple[int, bool]] | list[tuple[int, bool]]") -> Curve:
    """The curve of (length, censored) samples: exponential under 10 of them, else Kaplan-Meier with that tail.

    The exponential's rate is ends / tokens lived through, its maximum-likelihood estimate under censoring, with one end
    after 512 tokens added. One sample longer than all is added to the product limit, so that it never reaches 0.
    """
    lengths, censored = zip(*samples, strict=True) if samples else ((), ())
    rate = (len(samples) - sum(censored) + 1) / (sum(lengths) + _PRIOR_TOKENS)
    if len(samples) < _DRAWN:
        return Curve(tail_rate=rate)
    ends: list[int] = []
    after = [1.0]
    area = [0.0]
    at_risk = len(samples) + 1
    ordered = sorted(samples)  # at equal lengths, ends come before censored ones
    for length, capped in ordered:
        if not capped:
            left = after[-1] * (at_risk - 1) / at_risk
            if ends and ends[-1] == length:
                after[-1] = left
            else:
                area.append(area[-1] + after[-1] * (length - (ends[-1] if ends else 0)))
                ends.append(length)
                after.append(left)
        at_risk -= 1
    return Curve(tuple(ends), tuple(after), tuple(area), ordered[-1][0], min(rate, _HIGHEST_TAIL_RATE))
