"""One output as the scheduler knows it: what it is to become, what there is of it, and what it waits for."""

from dataclasses import dataclass

from kvplane_runtime.ring.accounting import Tokens
from kvplane_runtime.ring.cost import NOTHING, Work
from kvplane_runtime.ring.layout import Layout, Placement
from kvplane_runtime.ring.ranges import Run
from kvplane_runtime.ring.requests import Request


@dataclass(slots=True, eq=False)
class Job:
    """A request in progress."""

    request: Request
    max_tokens: int
    outputs: set[int]
    """Sequences that are not over."""


@dataclass(slots=True, eq=False)
class TokenSequence:
    """One output, or what is kept of one."""

    id: int
    job: Job | None
    """None: finished, and kept."""
    output: int
    prompt: int
    """Tokens of the prompt."""
    tokens: list[int]
    layout: Layout
    placement: Placement
    lead: int | None = None
    """The sequence that computes the prompt for this one; None once it is there."""
    since: float = 0.0
    """When it began to wait for its prefill."""
    work: Work = NOTHING
    """Of its prefill, when it began to wait."""
    held_up: bool = False
    """It has waited for a window of a long prefill."""
    begun: bool = False
    reached: int = 0
    """Positions that were computed once."""
    parked_since: float | None = None

    @property
    def request(self) -> str:
        """Of a sequence in progress."""
        assert self.job is not None  # noqa: S101  (only these are asked)
        return self.job.request.id

    @property
    def target(self) -> int:
        """Positions whose KV the next token needs: the prompt, or all but the newest token."""
        return max(self.prompt, len(self.tokens) - 1)

    @property
    def to_generate(self) -> int:
        """Positions behind the target that a sequence in progress may come to have; the last token needs no KV."""
        assert self.job is not None  # noqa: S101  (only these are asked)
        return self.prompt + self.job.max_tokens - 1 - self.target

    @property
    def ready(self) -> bool:
        """Whether all KV is there that the next token needs."""
        return self.layout.length >= self.target and self.layout.complete()

    @property
    def goes_on(self) -> bool:
        """Whether it is computed in its own right: not finished, not parked, and not waiting for another's prompt."""
        return self.job is not None and self.lead is None and self.parked_since is None

    @property
    def waits_for_room(self) -> bool:
        """Whether it is parked, in its own right."""
        return self.lead is None and self.parked_since is not None

    @property
    def waits(self) -> bool:
        """Whether it waits, in its own right, for the first window of its prompt, or parked for room."""
        return self.waits_for_room or (self.prefills and not self.begun)

    @property
    def decodes(self) -> bool:
        """Whether it is in the next decode batch."""
        return self.goes_on and self.ready

    @property
    def prefills(self) -> bool:
        """Whether its next step is a window."""
        return self.goes_on and not self.ready

    def missing(self) -> tuple[Run, ...]:
        """Positions that are still to be computed, or again."""
        return self.layout.missing(0, self.target)

    @property
    def missing_tokens(self) -> int:
        """How many these are."""
        return self.target - sum(self.held())

    def held(self) -> Tokens:
        """KV tokens by rank."""
        return tuple(self.layout.tokens(rank) for rank in range(self.layout.ranks))
