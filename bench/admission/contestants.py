"""Who competes: a way to stand before the engine, under a name that the report shows.

Three ways: flags of vLLM's own, a peer's policy in the load generator's gate, and our sidecar as the process that it is
in a pod, with the configuration that the operator would render. Each kind of engine runs beside the others all the time
(an idle one takes no CPU) so that the contestants take turns within minutes on the same machine state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from bench.admission.goals import Goals
from bench.admission.policies.kaito import QueueDepthGuard
from bench.admission.policies.llmd import FlowControl, UtilizationDetector
from bench.admission.policies.unlimited import Unlimited
from bench.admission.policies.vllm_caps import QueueCaps
from bench.admission.policy import Policy

OURS = "kvplane"
NONE = "none"
VLLM_CAPS = "vllm-caps"
CAPS = (6, 9, 13, 19, 28)
"""In-flight caps tried for vLLM's own flag, and with hindsight: from six long requests to more than memory holds."""


class Engines(Enum):
    """Which engine a contestant runs on; all have the same arguments otherwise."""

    PLAIN = "plain"
    CAPPED = "capped"
    """With vLLM's own cap as a flag."""
    SIDECAR = "sidecar"
    """Behind our sidecar, whose view of its engine must not be disturbed by what others send."""


@dataclass(frozen=True)
class Contestant:
    """One way of admission."""

    name: str
    engine: Engines
    policy: Callable[[Goals], Policy] | None = None
    """In the gate; None: nothing but what the engine, or the sidecar, does itself."""


def capped(cap: int) -> Contestant:
    """An in-flight cap in the gate, which is the engine's ``--max-num-queued-reqs`` without a restart for each value."""
    return Contestant(f"cap {cap}", Engines.PLAIN, lambda goals: QueueCaps(max_num_queued_reqs=cap))


CONTESTANTS = (
    Contestant(NONE, Engines.PLAIN, lambda goals: Unlimited()),
    Contestant(VLLM_CAPS, Engines.CAPPED),
    Contestant("kaito", Engines.PLAIN, lambda goals: QueueDepthGuard()),
    Contestant(
        "gateway",
        Engines.PLAIN,
        lambda goals: FlowControl(UtilizationDetector(), limit_seconds=goals.ttft_seconds),
    ),
    Contestant(OURS, Engines.SIDECAR),
)
"""With their defaults, but for the cap (tuned) and the gateway's queue limit (the goal, see ``policies.llmd``)."""
