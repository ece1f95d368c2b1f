"""How much is measured, and with which settings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

WINDOW_SECONDS: Final = 1.0
"""``KVPLANE_RING_SLICE_SECONDS`` of the served rings: its default."""
COMM_OVER_COMPUTE: Final = 0.8


@dataclass(frozen=True)
class Size:
    """How often, and how long."""

    architectures: int | None = None
    """How many of the proved ones; None: all."""
    exact_ranks: tuple[int, ...] = (2, 4)
    prefill_tokens: int = 8192
    prefill_pairs: int = 5
    link_tokens: int = 4096
    link_rounds: int = 15
    """A pair takes two seconds, and two percent are to be told."""
    long_tokens: int = 100_000
    long_window: int = 16_384
    long_pairs: int = 3
    decode_lengths: tuple[int, ...] = (1024, 16_384, 65_536, 262_144)
    decode_pairs: int = 5
    decode_tokens: int = 8
    """Of each pair, on either side."""
    first_tokens: int = 8000
    first_pairs: int = 7
    fault_prompt: int = 20_000
    fault_tokens: int = 200
    fault_rounds: int = 3
    """Of each kind."""
    beside_tokens: int = 100_000
    beside_prefills: int = 3
    idle_requests: int = 120


QUICK: Final = Size(
    architectures=3,
    prefill_tokens=1024,
    prefill_pairs=2,
    link_tokens=1024,
    link_rounds=2,
    long_tokens=8192,
    long_window=4096,
    long_pairs=1,
    decode_lengths=(1024, 16_384, 32_768),
    decode_pairs=2,
    decode_tokens=3,
    first_tokens=5000,
    first_pairs=2,
    fault_prompt=10_000,
    fault_tokens=150,
    fault_rounds=1,
    beside_tokens=30_000,
    beside_prefills=1,
    idle_requests=15,
)

SETTINGS: Final[Mapping[str, str]] = {"KVPLANE_RING_SLICE_SECONDS": f"{WINDOW_SECONDS:g}"}
"""Settings of the served rings; all others are the defaults."""
