"""Admission in virtual time, driven as the sidecar drives it."""

import random
from dataclasses import dataclass, field

from kvplane_api.wire import SidecarConfig
from kvplane_runtime.admission.controller import Admission
from kvplane_runtime.admission.demand import Demand, Entry, Feedback

BLOCKS = 95
BLOCK_SIZE = 32


def configuration(**sections: object) -> SidecarConfig:
    """A configuration with these ``slo``, ``engine`` and ``admission``, by their wire names."""
    return SidecarConfig.model_validate({"servedName": "model", **sections})


@dataclass
class World:
    """One engine's admission, its clock, and every decision so far."""

    config: SidecarConfig = field(default_factory=configuration)
    ring: bool = False
    now: float = 1000.0
    decided: list[Entry] = field(default_factory=list)

    def __post_init__(self) -> None:
        uniform = random.Random(1).random  # noqa: S311  (spread, not secrecy)
        self.admission = Admission(config=self.config, uniform=uniform, ring=self.ring)

    def scrape(self, **signals: object) -> None:
        """The engine answers: with a capacity of 95 blocks x 32 tokens, unless told otherwise."""
        known: dict[str, object] = {
            "kv_blocks": BLOCKS,
            "block_size_tokens": BLOCK_SIZE,
            "max_model_len_tokens": BLOCKS * BLOCK_SIZE,
        }
        self.admission.observe(Feedback(**{**known, **signals}), now=self.now)  # type: ignore[arg-type]

    def offer(self, prompt_tokens: int = 100, **demand: object) -> Entry:
        """A request arrives."""
        return self.admission.offer(Demand(prompt_tokens, **demand), now=self.now)  # type: ignore[arg-type]

    def decide(self) -> list[Entry]:
        """What is ruled on now."""
        decided = self.admission.decide(now=self.now)
        self.decided += decided
        return decided

    def pass_seconds(self, seconds: float) -> None:
        """Time goes by, with each decision made when it is due."""
        until = self.now + seconds
        while (due := self.admission.next_decision_at()) is not None and due <= until:
            self.now = max(self.now, due)
            self.decide()
            if self.admission.next_decision_at() == due:
                raise AssertionError(f"The decision due at {due} was made and is still due.")
        self.now = until

    def run(self, entry: Entry, tokens: int, *, seconds_per_token: float = 0.01) -> None:
        """The engine streams ``tokens`` more tokens of a request."""
        if entry.first_token_at is None:
            self.admission.first_token(entry, now=self.now)
        for _ in range(tokens):
            self.admission.progress(entry, entry.generated + 1, now=self.now)
            self.now += seconds_per_token

    def finish(self, entry: Entry, output_tokens: int | None = None) -> None:
        """The engine finishes a request."""
        self.admission.end(entry, now=self.now, completed=True, output_tokens=output_tokens)

    def teach(self, *, output_tokens: int, prompt_tokens: int = 100, requests: int = 40) -> None:
        """So many requests of one kind go by, one at a time, their outputs ending by themselves."""
        for _ in range(requests):
            entry = self.offer(prompt_tokens)
            assert entry.admitted_at is not None
            self.admission.first_token(entry, now=self.now)
            self.finish(entry, output_tokens)
