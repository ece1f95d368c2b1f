"""Who is next: the order of the requests that wait, fair between tenants, and none waits beyond its time.

1. Requests that the engine sent back.
2. By class; a request that has waited 0.8 of its time counts as of the highest, and the ceilings of the others no longer
   hold for it: a class can be held back and not starved.
3. Between tenants, the one least served.
4. Within a tenant, those that have waited 0.8 of their time, the one that runs out first before the others; then the
   shortest prompt, aged: each second of waiting counts as 1,000 tokens. (Shortest remaining processing time first
   minimises waiting; aging bounds the price that long prompts pay for it.)

Served is what a tenant got in tokens, an output token as two of the prompt, forgotten with a half-life of 60 s: deficit
round robin's account kept as a virtual counter (arXiv 2401.00588). A tenant that comes back starts level with the least
served one that waits: neither idling nor new names earn credit.
"""

import math
from bisect import bisect_left, bisect_right, insort
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, count
from typing import Final

from kvplane_runtime.admission.demand import Entry, Reason

FORCED_SHARE: Final = 0.8
"""Share of its time after which a request goes before those that would be better for the engine."""
_TOKENS_PER_SECOND: Final = 1000.0
_OUTPUT_WEIGHT: Final = 2.0
_HALF_LIFE_SECONDS: Final = 60.0
_ACCOUNTS: Final = 1024
"""Tenants whose service is remembered; the one unserved for longest is forgotten first."""


@dataclass(slots=True, eq=False)
class Waiting:
    """A request in the queue."""

    entry: Entry
    expires_at: float
    """When it is refused at the latest."""
    forced_at: float
    held_by: Reason
    """The gate that last kept it here; DEADLINE while it was not its turn yet."""
    returned: bool
    """The engine sent it back once."""
    not_before: float
    """When it may go to the engine again."""
    number: int = field(default=0, init=False)

    def forced(self, *, now: float) -> bool:
        """Whether it goes before the common order, and what comes free is kept for it until it fits."""
        return self.returned or self.forced_at <= now


class Queue:
    """The requests that wait. Its bounds are the caller's: it holds what it is given."""

    def __init__(self) -> None:
        self._waiting: dict[Entry, Waiting] = {}
        self._lines: dict[tuple[int, str], list[tuple[float, int, Waiting]]] = {}
        """By class and tenant, in the order of their ranks."""
        self._by_force: list[tuple[float, int, Waiting]] = []
        self._by_expiry: list[tuple[float, int, Waiting]] = []
        self._returned: list[tuple[float, int, Waiting]] = []
        self._by_tenant: Counter[str] = Counter()
        self._served: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """By tenant: decayed tokens, and the time they are decayed to."""
        self._numbers = count()
        self.prompt_tokens = 0
        self.prompt_bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._waiting.values())

    @property
    def tenants(self) -> int:
        """Tenants remembered."""
        return len(self._served)

    def put(self, waiting: Waiting, *, now: float) -> None:
        """Adds a request."""
        demand = waiting.entry.demand
        waiting.number = next(self._numbers)
        self._lift(demand.tenant, now=now)
        self._waiting[waiting.entry] = waiting
        if waiting.returned:
            insort(self._returned, _key(waiting.entry.arrived_at, waiting))
        else:
            line = self._lines.setdefault((demand.priority, demand.tenant), [])
            insort(line, _key(_rank(waiting.entry), waiting))
            insort(self._by_force, _key(waiting.forced_at, waiting))
        insort(self._by_expiry, _key(waiting.expires_at, waiting))
        self._by_tenant[demand.tenant] += 1
        self.prompt_tokens += demand.prompt_tokens
        self.prompt_bytes += demand.prompt_bytes

    def take(self, entry: Entry) -> Waiting | None:
        """Removes a request; None if it does not wait."""
        waiting = self._waiting.pop(entry, None)
        if waiting is None:
            return None
        demand = entry.demand
        if waiting.returned:
            _drop(self._returned, entry.arrived_at, waiting)
        else:
            line = self._lines[demand.priority, demand.tenant]
            _drop(line, _rank(entry), waiting)
            if not line:
                del self._lines[demand.priority, demand.tenant]
            _drop(self._by_force, waiting.forced_at, waiting)
        _drop(self._by_expiry, waiting.expires_at, waiting)
        self._by_tenant[demand.tenant] -= 1
        if not self._by_tenant[demand.tenant]:
            del self._by_tenant[demand.tenant]
        self.prompt_tokens -= demand.prompt_tokens
        self.prompt_bytes -= demand.prompt_bytes
        return waiting

    def charge(self, tenant: str, *, prompt_tokens: float, output_tokens: float, now: float) -> None:
        """Adds to what a tenant was served; negative to give back."""
        tokens = self._account(tenant, now=now) + prompt_tokens + _OUTPUT_WEIGHT * output_tokens
        self._served[tenant] = max(0.0, tokens), now
        self._served.move_to_end(tenant)
        if len(self._served) > _ACCOUNTS:
            self._served.popitem(last=False)

    def expired(self, *, now: float) -> list[Waiting]:
        """Those whose time is over."""
        return [waiting for _, _, waiting in self._by_expiry[: _upto(self._by_expiry, now)]]

    def next_expiry(self) -> float | None:
        """When the first request runs out of time."""
        return self._by_expiry[0][0] if self._by_expiry else None

    def turns(self, *, now: float) -> list[Waiting]:
        """The requests to be looked at now, one of each tenant and class at most, in their order."""
        turns: list[tuple[tuple[float, ...], Waiting]] = []
        hurried: dict[str, Waiting] = {}
        for _, _, waiting in self._by_force[: _upto(self._by_force, now)]:
            other = hurried.get(waiting.entry.demand.tenant)
            if other is None or waiting.expires_at < other.expires_at:
                hurried[waiting.entry.demand.tenant] = waiting
        for tenant, waiting in hurried.items():
            turns.append(((0, self._account(tenant, now=now), 0, waiting.expires_at, waiting.number), waiting))
        for (priority, tenant), line in self._lines.items():
            rank, number, waiting = line[0]
            turns.append(((priority, self._account(tenant, now=now), 1, rank, number), waiting))
        turns.sort(key=lambda turn: turn[0])
        back = [waiting for _, _, waiting in self._returned if waiting.not_before <= now]
        return back + [waiting for _, waiting in turns]

    def leads(self, entry: Entry, *, now: float) -> bool:
        """Whether a new request would be the first of its line, and none goes before all lines."""
        if self._returned or _upto(self._by_force, now):
            return False
        line = self._lines.get((entry.demand.priority, entry.demand.tenant))
        return line is None or _rank(entry) < line[0][0]

    def crowding(self, tenant: str) -> Waiting | None:
        """The request that makes room for one of ``tenant`` in a full queue: the last one of the tenant with most.

        None unless that tenant has at least two more there.
        """
        if not self._by_tenant:
            return None
        most, waiting = self._by_tenant.most_common(1)[0]
        if waiting < self._by_tenant.get(tenant, 0) + 2:
            return None
        lines = [line for (_, name), line in self._lines.items() if name == most]
        return max(lines, key=lambda line: line[-1][2].entry.demand.priority)[-1][2] if lines else None

    def ahead(self, *, of: Entry | None = None) -> dict[Entry, int]:
        """Prompt tokens that go before each request that waits, or before a new one, when tenants take turns.

        A tenant goes through its own line, and meanwhile each other tenant gets as much, or all that it has. Classes are
        taken each for itself: a lower one gets its turn by time, whatever the higher ones want.
        """
        classes: defaultdict[int, defaultdict[str, list[Entry]]] = defaultdict(lambda: defaultdict(list))
        for entry in sorted((*self._waiting, of) if of is not None else self._waiting, key=_rank):
            classes[entry.demand.priority][entry.demand.tenant].append(entry)
        result: dict[Entry, int] = {}
        for lines in classes.values():
            totals = sorted(sum(entry.demand.prompt_tokens for entry in line) for line in lines.values())
            sums = [0, *accumulate(totals)]
            for line in lines.values():
                own = 0
                for entry in line:
                    before, own = own, own + entry.demand.prompt_tokens
                    below = bisect_right(totals, own)
                    others = sums[below] + own * (len(totals) - below) - own
                    result[entry] = before + others
        return result

    def _account(self, tenant: str, *, now: float) -> float:
        tokens, at = self._served.get(tenant, (0.0, now))
        return tokens * math.pow(0.5, (now - at) / _HALF_LIFE_SECONDS)

    def _lift(self, tenant: str, *, now: float) -> None:
        """A tenant of whom nobody waits starts level with the least served of those who do."""
        if tenant in self._by_tenant or not self._by_tenant:
            return
        level = min(self._account(name, now=now) for name in self._by_tenant)
        if self._account(tenant, now=now) < level:
            self.charge(tenant, prompt_tokens=level - self._account(tenant, now=now), output_tokens=0, now=now)


def _rank(entry: Entry) -> float:
    # p - 1000 x (now - arrival), without the term that all have in common.
    return entry.demand.prompt_tokens + _TOKENS_PER_SECOND * entry.arrived_at


def _key(rank: float, waiting: Waiting) -> tuple[float, int, Waiting]:
    return rank, waiting.number, waiting


def _drop(line: list[tuple[float, int, Waiting]], rank: float, waiting: Waiting) -> None:
    del line[bisect_left(line, (rank, waiting.number), key=lambda item: item[:2])]


def _upto(line: list[tuple[float, int, Waiting]], now: float) -> int:
    return bisect_left(line, (now, float("inf")), key=lambda item: item[:2])
