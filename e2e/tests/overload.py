"""Three services asked for more than they can do, at the same time, while a Prometheus watches; and what came of it.

For the first seconds admission decides everywhere. Then one service's is switched to Observe and Off by its spec, while
the load goes on, until the alert on thrashing fires. Beside it, on an engine with the same arguments, a service that sets
nothing but its promises has the same load and keeps its admission, for longer than the alert needs; so does the third,
whose callers make pauses. The load ends, admission decides everywhere again, and everything settles. It runs once: it
takes minutes, since an alert does, and many tests look at it.

How many come back and get in (`Load.got_in`) follows from the pauses. Admission cannot tell who comes back from who comes
for the first time, and sends away at most as many as it lets in, since whoever is sent away queues behind the others who
were (kvplane_runtime.admission.retry). So where each answer is at once followed by the next request, and nobody waits,
half of all tries succeed for as long as that lasts, and a caller of two retries gets in three times out of four: no
Retry-After can do more. Where callers make pauses, or may wait, those who come back find less before them, and who is
refused again was told the wrong time. `directory` is for that: its KV memory holds nine requests, ten wait, and the other
callers come back while those who were answered make their pause.
"""

import json
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

from e2e.prometheus import Prometheus
from e2e.stack import Stack
from e2e.tests import sidecar
from e2e.tests.client import Load, address
from e2e.tests.fleet import Fleet

CALLERS: Final = 24
"""For each service; its KV memory holds some ten of their requests to the end."""
PROMPT_TOKENS: Final = 64
OUTPUT_TOKENS: Final = (120, 360)
"""Long beside the prompt: an engine that takes all it is given runs out of memory in the middle of answers. Of different
lengths, so that places become free one by one."""
PAUSE_SECONDS: Final = 5.0
"""Of each caller of `directory` between an answer and its next request. The others make none: with pauses, a fast engine
has fewer callers at once, and what they hold fits without admission."""
ENFORCED_SECONDS: Final = 20.0
LET_LOOSE: Final = "hub"
"""The service whose admission is switched off."""
ITS_TWIN: Final = "volume"
"""The service with the same engine and the same load that keeps its admission, which is as a user gets it."""
ALERT: Final = "KVPlaneThrashing"
ALERT_NEEDS_SECONDS: Final = 3 * 10 + 75
"""Of thrashing: three windows of the detector, and the time for which the alert wants it to last."""
_ALERT_SECONDS: Final = 210.0
"""Until the spec has reached the sidecar, three windows of 10 s, and 75 s that it must last."""


@dataclass(frozen=True)
class Counted:
    """Counters of one engine over one part of the overload."""

    preemptions: float
    wasted_tokens: float
    processed_tokens: float


@dataclass(frozen=True)
class Overload:
    """All that is known of it afterwards; times in seconds since 1970."""

    prometheus: Prometheus
    began: int
    ended: int
    loads: Mapping[str, Load]
    """What callers got, by service."""
    enforced: Mapping[str, Counted]
    """While admission decided for all."""
    whole: Mapping[str, Counted]
    """From beginning to end."""
    policies: tuple[str, ...]
    """That the switched service's sidecar told, one after the other."""
    pods_before: Mapping[str, str]
    """UID of the only pod, by service."""
    pods_after: Mapping[str, str]
    settled: Mapping[str, Mapping[str, Any]]
    """`admission` of the sidecars' state when everything was answered."""


def run(stack: Stack, fleet: Fleet, prometheus: Prometheus) -> Overload:
    """Let it happen."""
    services = fleet.namespaces
    ips = {name: sidecar.pod_ip(stack, namespace, name) for name, namespace in services.items()}
    pods_before = _uids(stack, fleet)
    at_first = {name: _count(ip) for name, ip in ips.items()}
    began = int(time.time())
    with ExitStack() as running:
        loads = {name: running.enter_context(_load(stack, namespace, name)) for name, namespace in services.items()}
        time.sleep(ENFORCED_SECONDS)
        enforced = {name: _since(at_first[name], _count(ip)) for name, ip in ips.items()}
        policies = tuple(_switch(stack, fleet, policy, ips[LET_LOOSE]) for policy in ("Observe", "Off"))
        end = time.monotonic() + _ALERT_SECONDS
        while (ALERT, services[LET_LOOSE], LET_LOOSE) not in prometheus.firing() and time.monotonic() < end:
            time.sleep(1)
        whole = {name: _since(at_first[name], _count(ip)) for name, ip in ips.items()}
        ended = math.ceil(time.time())  # not before the evaluation that was just seen
        for load in loads.values():  # all at once; the context waits for the answers that are under way
            load.stop()
    policies += (_switch(stack, fleet, "Enforce", ips[LET_LOOSE]),)
    return Overload(
        prometheus=prometheus,
        began=began,
        ended=ended,
        loads=loads,
        enforced=enforced,
        whole=whole,
        policies=policies,
        pods_before=pods_before,
        pods_after=_uids(stack, fleet),
        settled={name: sidecar.state(ip)["admission"] for name, ip in ips.items()},
    )


def _load(stack: Stack, namespace: str, name: str) -> Load:
    where = address(stack, namespace, name)
    return Load(
        where,
        name,
        workers=CALLERS,
        prompt_tokens=PROMPT_TOKENS,
        min_tokens=OUTPUT_TOKENS[0],
        max_tokens=OUTPUT_TOKENS[1],
        pause_seconds=0.0 if name in (LET_LOOSE, ITS_TWIN) else PAUSE_SECONDS,
    )


def _switch(stack: Stack, fleet: Fleet, policy: str, ip: str) -> str:
    """Change the policy in the spec; returns what the sidecar says once it says so, or else when it should have."""
    change = json.dumps({"spec": {"admission": {"policy": policy}}})
    stack.kubectl("patch", "llms", LET_LOOSE, "-n", fleet.namespaces[LET_LOOSE], "--type=merge", f"--patch={change}")
    end = time.monotonic() + 30
    while (told := str(sidecar.state(ip)["admission"]["policy"])) != policy and time.monotonic() < end:
        time.sleep(0.2)
    return told


def _uids(stack: Stack, fleet: Fleet) -> dict[str, str]:
    pods = {name: sidecar.pods(stack, namespace, name) for name, namespace in fleet.namespaces.items()}
    return {name: ",".join(sorted(pod["metadata"]["uid"] for pod in found)) for name, found in pods.items()}


def _count(ip: str) -> Counted:
    prompt, hits, output = (
        sidecar.value(ip, f"kvplane_{name}_total")
        for name in ("prompt_tokens", "prefix_cache_hits_tokens", "generation_tokens")
    )
    return Counted(
        preemptions=sidecar.value(ip, "kvplane_preemptions_total"),
        wasted_tokens=sidecar.value(ip, "kvplane_wasted_tokens_total"),
        processed_tokens=prompt - hits + output,
    )


def _since(before: Counted, after: Counted) -> Counted:
    return Counted(
        preemptions=after.preemptions - before.preemptions,
        wasted_tokens=after.wasted_tokens - before.wasted_tokens,
        processed_tokens=after.processed_tokens - before.processed_tokens,
    )
