"""API requests per second, counted by the API server itself: what a controller says of itself is not evidence.

The counter does not tell who asked. So the same window is measured once without the controller, and that rate, which is
the API server's own housekeeping and this benchmark's one reading of the counter, is subtracted. A watch is counted by
the API server when it ends.
"""

import re
from collections import Counter
from dataclasses import dataclass

_SAMPLE = re.compile(r"^apiserver_request_total\{(?P<labels>.*)\} (?P<value>\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')

WRITES = frozenset({"POST", "PUT", "PATCH", "APPLY", "DELETE", "DELETECOLLECTION"})


@dataclass(frozen=True)
class Requests:
    """Requests that an API server has answered, by verb and resource (empty for paths that are no resource)."""

    counts: Counter[tuple[str, str]]

    def since(self, before: "Requests") -> "Requests":
        """What was added to ``before``."""
        return Requests(self.counts - before.counts)

    def total(self) -> int:
        return sum(self.counts.values())

    def writes(self) -> int:
        """Writes but those of Leases, which never cease."""
        return sum(n for (verb, resource), n in self.counts.items() if verb in WRITES and resource != "leases")

    def by_kind(self) -> dict[str, int]:
        """As plain data: "PUT leases" to its count, the most frequent first."""
        return {f"{verb} {resource}".strip(): n for (verb, resource), n in self.counts.most_common()}


def parse(exposition: str) -> Requests:
    """The counter ``apiserver_request_total`` of the API server's /metrics."""
    counts: Counter[tuple[str, str]] = Counter()
    for sample in _SAMPLE.finditer(exposition):
        labels = dict(_LABEL.findall(sample["labels"]))
        resource = labels.get("resource", "")
        if subresource := labels.get("subresource", ""):
            resource = f"{resource}/{subresource}"
        counts[labels.get("verb", ""), resource] += int(float(sample["value"]))
    return Requests(counts)
