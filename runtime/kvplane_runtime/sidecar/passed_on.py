"""The engine's metrics that go to Prometheus as they are: ``kvplane_ring_*``, what only a ring has.

The engine listens on loopback, so Prometheus reaches them only through the sidecar's admin port. Their lines are picked out
of each scrape, every second and on the loop that relays tokens, which costs next to nothing; they are read when Prometheus
asks. Whole families pass or do not: one with a malformed line is left out, and the others are not spoiled by it.
"""

import re
from collections.abc import Iterator
from typing import Final

from prometheus_client.metrics_core import Metric as Family

from kvplane_runtime.sidecar import exposition

PREFIX: Final = "kvplane_ring_"
MOST_LINES: Final = 16_384
"""More than rank 0 of the largest ring has: eight for each of 1,024 ranks."""
_STARTS: Final = (PREFIX, f"# HELP {PREFIX}", f"# TYPE {PREFIX}")
_FAMILY: Final = re.compile(
    rf"# HELP (?P<name>{PREFIX}[a-z0-9_]+) (?P<help>[^\n]*)\n"
    r"# TYPE (?P=name) (?P<kind>counter|gauge|histogram)\n"
    r"(?P<samples>(?:[^#\n][^\n]*\n)*)"
)
_SUFFIXES: Final = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
_ESCAPE: Final = re.compile(r"\\([\\n])")


def lines(text: str) -> str:
    """The lines of an exposition that are passed on; raises ValueError if there are too many to be a rank's."""
    found = [line for line in text.splitlines() if line.startswith(_STARTS)]
    if len(found) > MOST_LINES:
        raise ValueError(f"{len(found)} lines are named {PREFIX}*, more than any rank has.")
    return "".join(f"{line}\n" for line in found)


def families(text: str) -> Iterator[Family]:
    """The well-formed families among such lines, each once."""
    seen: set[str] = set()
    for block in _FAMILY.finditer(text):
        name, kind = block["name"], block["kind"]
        try:
            samples = exposition.read(block["samples"], {name + suffix for suffix in _SUFFIXES[kind]})
        except ValueError:
            continue
        whole = sum(map(len, samples.values())) == block["samples"].count("\n")
        if name in seen or not samples or not whole or (kind == "counter") != name.endswith("_total"):
            continue
        seen.add(name)
        family = Family(name.removesuffix("_total"), _ESCAPE.sub(_unescaped, block["help"]), kind)
        for series, found in samples.items():
            for sample in found:
                family.add_sample(series, sample.labels, sample.value)
        yield family


def _unescaped(escape: re.Match[str]) -> str:
    return "\n" if escape[1] == "n" else "\\"
