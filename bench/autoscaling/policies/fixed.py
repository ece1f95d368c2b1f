"""Static N, the frontier that every law is measured against; and the clairvoyant minimum, which no law can beat.

The clairvoyant one knows the need of each moment to come, and a start takes it as long as everybody else: it asks at each
moment for the most that will be needed until a replica asked for at its next decision could serve.
"""

from collections.abc import Callable
from dataclasses import dataclass

from bench.autoscaling.policy import Fleet


@dataclass(frozen=True)
class Static:
    """Always the same."""

    replicas: int
    tick_seconds: float = 60.0

    @property
    def name(self) -> str:
        return f"static {self.replicas}"

    def start(self, fleet: Fleet, now: float) -> None:
        return None

    def decide(self, fleet: Fleet, memory: None, now: float) -> tuple[int, None]:
        return self.replicas, None


@dataclass(frozen=True)
class Clairvoyant:
    """Knows what will be needed."""

    needed: Callable[[float, float], int]
    """Most replicas needed at any time between two moments."""
    startup_seconds: float
    tick_seconds: float = 5.0
    name: str = "clairvoyant"

    def start(self, fleet: Fleet, now: float) -> None:
        return None

    def decide(self, fleet: Fleet, memory: None, now: float) -> tuple[int, None]:
        return self.needed(now, now + self.startup_seconds + self.tick_seconds), None
