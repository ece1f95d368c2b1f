"""From what was measured to the table and the last line. Pure.

Each row of the table has its samples as plain data, as they stand in the records, and knows its figure, its target and
whether the one meets the other.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bench import report
from bench.report import Value

HEADER: Final = ("", "ring", "target", "met", "beside it, measured here", "published")
_n = report.number


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    ring: str
    target: str
    met: bool
    beside: str = ""
    published: str = ""

    def cells(self) -> tuple[str, ...]:
        return (self.what, self.ring, self.target, "yes" if self.met else "NO", self.beside, self.published)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of ours / theirs, pair by pair; raises ValueError where there are no pairs."""
    return statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))


def spread(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The smallest and the largest of the pairs' ratios."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return f"{_n(min(ratios))} to {_n(max(ratios))}"


@dataclass(frozen=True)
class Exactness:
    """Largest errors of the logits, as a share of the largest logit or of 1, by architecture and ring size."""

    errors: Mapping[str, Mapping[str, float]]
    types: Mapping[str, str]
    """Model type of each architecture: several variants of one count once."""

    @property
    def worst(self) -> float:
        return max(error for sizes in self.errors.values() for error in sizes.values())

    @property
    def architectures(self) -> int:
        return len({self.types[name] for name in self.errors})

    def rows(self) -> list[Row]:
        sizes = sorted({size for found in self.errors.values() for size in found})
        return [
            Row(
                f"exactness: largest error of a logit, {self.architectures} architectures, N = {', '.join(sizes)}",
                f"{self.worst:.1e}",
                "at most 5e-5",
                self.worst <= 5e-5 and self.architectures >= 20,
                published="nobody does",
            )
        ]

    def listing(self) -> str:
        """Every architecture; none is left out."""
        sizes = sorted({size for found in self.errors.values() for size in found})
        lines = [(name, *(f"{found[size]:.1e}" for size in sizes)) for name, found in sorted(self.errors.items())]
        return report.table(("architecture", *(f"N = {size}" for size in sizes)), lines)


@dataclass(frozen=True)
class Prefill:
    """Seconds of the same prompt: every rank the whole of it at once, and the ring once."""

    ranks: int
    tokens: int
    whole: Sequence[float]
    ring: Sequence[float]
    waited: Sequence[float]
    """Of each ring's, the longest that a rank stood still for communication."""

    @property
    def efficiency(self) -> float:
        return paired(self.whole, self.ring) / self.ranks

    def rows(self) -> list[Row]:
        low, high = (f(w / (self.ranks * r) for w, r in zip(self.whole, self.ring, strict=True)) for f in (min, max))
        return [
            Row(
                f"prefill of {self.tokens} tokens, N = {self.ranks}: work of one rank over the ring's",
                f"{_n(self.efficiency)} ({_n(low)} to {_n(high)})",
                "at least 0.95",
                self.efficiency >= 0.95,
                f"unsharded {_n(statistics.median(self.whole))} s on all ranks at once, ring {_n(statistics.median(self.ring))} s",
                "Meta 0.96 at 4 nodes (arXiv 2411.01783)",
            )
        ]


@dataclass(frozen=True)
class Exposed:
    """Seconds of a prefill whose exchanges take ``ratio`` of the attention beside them: not at all, overlapped, and not."""

    ratio: float
    free: Sequence[float]
    overlapped: Sequence[float]
    waiting: Sequence[float]

    @property
    def percent(self) -> float:
        return max(0.0, 100 * (paired(self.overlapped, self.free) - 1))

    def rows(self) -> list[Row]:
        other = 100 * (paired(self.waiting, self.free) - 1)
        return [
            Row(
                f"communication that takes {self.ratio:g} of attention's time: prefill longer by, %",
                f"{_n(self.percent)} ({spread(self.overlapped, self.free)} times)",
                "at most 2",
                self.percent <= 2,
                f"not overlapped {_n(other)}",
            )
        ]


@dataclass(frozen=True)
class Long:
    """One long prompt: seconds on the ring and unsharded on the same processors, and what each rank held."""

    ranks: int
    tokens: int
    ring: Sequence[float]
    whole: Sequence[float]
    held: Sequence[int]
    """KV tokens by rank."""
    resident_bytes: Sequence[int]
    """Largest resident memory of each rank's process."""
    equal: bool
    """The token that follows is the unsharded model's."""

    @property
    def ratio(self) -> float:
        return paired(self.ring, self.whole)

    @property
    def scaling(self) -> float:
        """KV tokens held over N times those of the fullest rank: 1 where context grows with N."""
        return sum(self.held) / (self.ranks * max(self.held))

    def rows(self) -> list[Row]:
        memory = ", ".join(_n(size / 2**30) for size in self.resident_bytes)
        return [
            Row(
                f"KV tokens of all {self.ranks} ranks over {self.ranks} times the fullest one's",
                _n(self.scaling),
                "at least 0.98",
                self.scaling >= 0.98,
                f"{min(self.held)} to {max(self.held)} tokens a rank, {memory} GiB resident",
                "vLLM PCP, SGLang: 1/N, the cache is replicated",
            ),
            Row(
                f"{self.tokens} tokens, N = {self.ranks}, over unsharded on the same processors",
                f"{_n(self.ratio)} ({spread(self.ring, self.whole)})",
                "at most 1.05",
                self.ratio <= 1.05,
                f"ring {_n(statistics.median(self.ring))} s, unsharded {_n(statistics.median(self.whole))} s",
                "vLLM on CPUs refuses it",
            ),
        ]


@dataclass(frozen=True)
class Decode:
    """Seconds of a token by context length: one rank on one processor, and two on two."""

    one: Mapping[str, Sequence[float]]
    two: Mapping[str, Sequence[float]]
    apart: Mapping[str, Sequence[float]]
    """Of two that exchange nothing, each with half of the context: the slower one's."""
    judged: str
    """The length of the claim, as a key."""

    def ratio(self, length: str) -> float:
        """Of the ring of two to one rank."""
        return paired(self.two[length], self.one[length])

    @property
    def gain(self) -> float:
        return 1 / self.ratio(self.judged)

    @property
    def at_most(self) -> float:
        """The gain if it cost nothing to exchange."""
        return 1 / paired(self.apart[self.judged], self.one[self.judged])

    def rows(self) -> list[Row]:
        def milliseconds(samples: Sequence[float]) -> str:
            return _n(1000 * statistics.median(samples))

        beyond = [length for length in self.one if int(length) > 16_384]
        worst = max((self.ratio(length) for length in beyond), default=self.ratio(self.judged))
        each = "; ".join(
            f"{length}: {milliseconds(self.one[length])} to {milliseconds(self.two[length])} ms" for length in self.one
        )
        return [
            Row(
                f"decode from {self.judged} tokens, N = 2: times faster than one rank on one processor",
                _n(self.gain),
                "at least 1.7",
                self.gain >= 1.7,
                f"two that exchange nothing, each with half of it: {_n(self.at_most)} times; {each}",
                "Meta 1.30 to 1.54 times slower (arXiv 2411.01783)",
            ),
            Row("… from more than 16k, at worst, over one rank", _n(worst), "at most 1.05", worst <= 1.05),
        ]


@dataclass(frozen=True)
class FirstToken:
    """Seconds to the first token of the same prompts, on the same processors."""

    tokens: int
    ring: Sequence[float]
    unsharded: Sequence[float]
    vllm: Sequence[float]
    products: Mapping[str, float]
    """GFLOP/s of matrix products, by library."""

    @property
    def over_vllm(self) -> float:
        return paired(self.ring, self.vllm)

    @property
    def over_unsharded(self) -> float:
        return paired(self.ring, self.unsharded)

    def rows(self) -> list[Row]:
        ring, unsharded, vllm = (1000 * statistics.median(each) for each in (self.ring, self.unsharded, self.vllm))
        name = f"first token of {self.tokens}, N = 2, over"
        products = ", ".join(f"{library} {_n(rate)}" for library, rate in self.products.items())
        return [
            Row(
                f"{name} vLLM's for CPUs",
                f"{_n(self.over_vllm)} ({spread(self.ring, self.vllm)})",
                "at most 0.7",
                self.over_vllm <= 0.7,
                f"ring {_n(ring)} ms, vLLM {_n(vllm)} ms; {products} GFLOP/s",
            ),
            Row(
                f"{name} the unsharded model's, in its process",
                f"{_n(self.over_unsharded)} ({spread(self.ring, self.unsharded)})",
                "at most 1.05",
                self.over_unsharded <= 1.05,
                f"unsharded {_n(unsharded)} ms",
            ),
        ]


@dataclass(frozen=True)
class Fault:
    """What one lost rank did to a request that was being answered."""

    kind: str
    """``kill`` or ``hang``."""
    detect_seconds: float
    """From the signal until the ring's end was known."""
    reform_seconds: float
    """From the signal until a ring worked again."""
    refilled: int
    """KV tokens computed again."""
    placed: int
    """KV tokens there were at the signal."""
    equal: bool
    """All tokens are the unsharded model's."""


@dataclass(frozen=True)
class Faults:
    """All drills."""

    ranks: int
    drills: Sequence[Fault]

    @property
    def refill(self) -> float:
        """Share of the KV that was computed again, times N: 1 where just the lost rank's was."""
        return max(self.ranks * drill.refilled / drill.placed for drill in self.drills)

    @property
    def detect(self) -> float:
        return max(drill.detect_seconds for drill in self.drills)

    @property
    def reform(self) -> float:
        return max(drill.reform_seconds for drill in self.drills)

    @property
    def equal(self) -> bool:
        return all(drill.equal for drill in self.drills)

    def rows(self) -> list[Row]:
        def worst(kind: str, seconds: str) -> str:
            found = [getattr(drill, seconds) for drill in self.drills if drill.kind == kind]
            return f"{kind} {_n(max(found))}" if found else f"{kind} none"

        restart = "all others: a full restart and a full prefill, the stream lost"
        kinds = ("kill", "hang")
        return [
            Row(
                f"a rank of {self.ranks} is lost: noticed after, s",
                ", ".join(worst(kind, "detect_seconds") for kind in kinds),
                "at most 1.5",
                self.detect <= 1.5,
                f"the worst of {len(self.drills)} drills",
            ),
            Row(
                "… the ring works again after, s",
                ", ".join(worst(kind, "reform_seconds") for kind in kinds),
                "at most 2",
                self.reform <= 2,
                published=restart,
            ),
            Row("… share computed again, times N", _n(self.refill), "at most 1.3", self.refill <= 1.3),
            Row("… tokens equal to the unsharded model's", "yes" if self.equal else "NO", "yes", self.equal),
        ]


@dataclass(frozen=True)
class Beside:
    """Seconds to the first token of short requests: with nothing else, and beside a long prefill."""

    tokens: int
    slice_seconds: float
    idle: Sequence[float]
    beside: Sequence[float]

    @property
    def over_slice(self) -> float:
        """How much longer the p99 is beside the prefill, in slices."""
        worst, usual = (report.percentile(samples, 0.99) for samples in (self.beside, self.idle))
        return (worst - usual) / self.slice_seconds

    def rows(self) -> list[Row]:
        idle, beside = (_n(1000 * report.percentile(samples, 0.99)) for samples in (self.idle, self.beside))
        return [
            Row(
                f"short requests beside {self.tokens} tokens: p99 of the first token longer by, slices",
                _n(self.over_slice),
                "at most 1",
                self.over_slice <= 1,
                f"p99 {beside} ms beside it ({len(self.beside)}), {idle} ms idle ({len(self.idle)}); "
                f"slice {self.slice_seconds:g} s",
            )
        ]


Measured = Exactness | Prefill | Exposed | Long | Decode | FirstToken | Faults | Beside


@dataclass(frozen=True)
class Results:
    """All rows' measurements."""

    exactness: Exactness
    prefill: Prefill
    exposed: Exposed
    long: Long
    decode: Decode
    first_token: FirstToken
    faults: Faults
    beside: Beside

    def rows(self) -> list[tuple[str, ...]]:
        """The table, in the order of the claims."""
        parts: tuple[Measured, ...] = (
            self.exactness,
            self.long,
            self.prefill,
            self.exposed,
            self.decode,
            self.first_token,
            self.faults,
            self.beside,
        )
        return [row.cells() for part in parts for row in part.rows()]

    def last_line(self) -> dict[str, Value]:
        """The figures of the last line, in its order."""
        return {
            "architectures": self.exactness.architectures,
            "max_diff": f"{self.exactness.worst:.1e}",
            "kv_scaling": self.long.scaling,
            "prefill_efficiency_n4": self.prefill.efficiency,
            "exposed_percent": self.exposed.percent,
            "long100k_ratio": self.long.ratio,
            "decode_gain_256k": self.decode.gain,
            "ttft8k_vs_vllm": self.first_token.over_vllm,
            "ttft8k_vs_hf": self.first_token.over_unsharded,
            "detect_s": self.faults.detect,
            "reform_s": self.faults.reform,
            "refill_share_times_n": self.faults.refill,
            "tokens_equal": "yes" if self.faults.equal and self.long.equal else "no",
            "short_ttft_p99_over_slice": self.beside.over_slice,
        }


KINDS: Final[Mapping[str, type[Measured]]] = {
    "exactness": Exactness,
    "prefill": Prefill,
    "exposed": Exposed,
    "long": Long,
    "decode": Decode,
    "first_token": FirstToken,
    "faults": Faults,
    "beside": Beside,
}
"""What each row's measurement is, by its name in the records; the order in which they are taken."""


def results(documents: Mapping[str, Mapping[str, Any]]) -> Results:
    """From plain data, as JSON has it; raises ValueError where a row is not measured yet."""
    missing = [name for name in KINDS if name not in documents]
    if missing:
        raise ValueError(f"Not measured yet: {', '.join(missing)}; run the benchmark again, it goes on where it ended.")
    found: dict[str, Any] = {name: kind(**documents[name]) for name, kind in KINDS.items() if kind is not Faults}
    drills = [Fault(**drill) for drill in documents["faults"]["drills"]]
    return Results(faults=Faults(documents["faults"]["ranks"], drills), **found)
