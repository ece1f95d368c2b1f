"""One service that scales by itself: through a step of load and back, blind for a minute, to nothing, and awake again.

It happens once, as it takes minutes: replicas go only after two start-ups without need, and those of an overload in a line
after that. A light load goes on all the while, almost without a pause, so that the service is always a busy one, and whatever is
lost on the way down is seen. At most two engines run at once, and they share 1.2 cores, so that the nodes' kubelets keep
enough. The minute of blindness begins when the replica that is too many would be about to go.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from e2e.cluster.cluster import Cluster
from e2e.prometheus import Prometheus
from e2e.stack import SYSTEM_NAMESPACE, Images, Stack, cpu_service
from e2e.tests import sidecar
from e2e.tests.client import Load, address, complete
from e2e.tests.fleet import BLOCK_TOKENS, KV_BLOCKS, MAX_SEQUENCES, reachable
from kvplane_api import names
from kvplane_api.wire import SidecarState
from kvplane_operator.autoscaler.settings import Tuning
from kvplane_operator.autoscaler.signals import read

NAME: Final = "elastic"
MOST_REPLICAS: Final = 2
CUT_SECONDS: Final = 60.0
ZERO_AFTER_SECONDS: Final = 20
_ENGINE_CORES: Final = "600m"
_WATCHED_SECONDS: Final = 20.0
"""Of light load before the step: until it is seen the service is read as a quiet one, every 15 s."""
_SHARED_SECONDS: Final = 20.0
"""In which both replicas serve the step."""
_BEFORE_SECONDS: Final = 30.0
"""How long before a replica could go the cut begins."""
_LONGEST_SECONDS: Final = 900.0
"""For anything: a start on 0.6 cores takes 75 s, and the way down four of them."""


@dataclass(frozen=True)
class Blind:
    """The minute in which the operator finds no way to the engines."""

    began: int
    ended: int
    asked: frozenset[int]
    """Replicas that the Deployment asked for meanwhile."""
    conditions: frozenset[tuple[str, str, str]]
    """Type, status and reason of every condition seen meanwhile."""
    fired: frozenset[tuple[str, str, str]]
    """Alerts that fired meanwhile, as Prometheus.fired."""


@dataclass(frozen=True)
class Elastic:
    """All that is known of it afterwards."""

    prometheus: Prometheus
    namespace: str
    began: int
    ended: int
    asked_seconds: float
    """From the first look at which one replica was too few to a Deployment of two."""
    step: Load
    light: Load
    """Before, beside and after the step, and all the way down."""
    blind: Blind
    seen_again: Mapping[str, Mapping[str, Any]]
    """The conditions when the way was there again, as soon as both were as before."""
    victim_cost: int | None
    """pod-deletion-cost of the pod that went; None: it had none, or was not seen going."""
    wake_seconds: float
    """From the annotation to a Deployment of one."""
    answer: Mapping[str, Any]
    """To the first request after that."""
    events: tuple[tuple[str, str], ...]
    """Reason and message of each of its events."""


def run(stack: Stack, cluster: Cluster, images: Images, prometheus: Prometheus, namespace: str) -> Elastic:
    """Let it happen."""
    began = int(time.time())
    stack.apply(service(namespace, images))
    stack.wait_ready(namespace, NAME)
    reachable(stack, namespace, NAME)
    where = address(stack, namespace, NAME)
    with Load(where, NAME, workers=3, max_tokens=100, pause_seconds=0.1) as light:
        time.sleep(_WATCHED_SECONDS)
        with Load(where, NAME, workers=20, prompt_tokens=64, min_tokens=120, max_tokens=360) as step:
            asked_seconds = _asked_after_overload(stack, namespace)
            _until(lambda: _ready(stack, namespace) == MOST_REPLICAS, "two replicas are not Ready")
            time.sleep(_SHARED_SECONDS)
        over = time.monotonic()
        costs: dict[str, int | None] = {}
        window = 2 * _horizon(prometheus, namespace)
        time.sleep(max(0.0, over + window - _BEFORE_SECONDS - time.monotonic()))
        blind = _cut(stack, cluster, prometheus, namespace)
        seen_again = _seen_again(stack, namespace)
        _until(lambda: _asked(stack, namespace) == 1, "two replicas did not become one")
        _until(lambda: _gone(stack, namespace, costs), "the second replica has not drained")
        time.sleep(2)
    _patch(stack, namespace, {"autoscaling": {"scaleToZeroAfterSeconds": ZERO_AFTER_SECONDS}})
    _until(lambda: not sidecar.pods(stack, namespace, NAME), "it did not go to zero")
    wake_seconds = _wake(stack, namespace)
    _until(lambda: _ready(stack, namespace) == 1, "it is not Ready again")
    reachable(stack, namespace, NAME)
    return Elastic(
        prometheus=prometheus,
        namespace=namespace,
        began=began,
        ended=int(time.time()),
        asked_seconds=asked_seconds,
        step=step,
        light=light,
        blind=blind,
        seen_again=seen_again,
        victim_cost=min((cost for cost in costs.values() if cost is not None), default=None),
        wake_seconds=wake_seconds,
        answer=complete(where, NAME, max_tokens=4),
        events=tuple((e["reason"], e["message"]) for e in stack.get(namespace, "events") if _about(e)),
    )


def service(namespace: str, images: Images) -> dict[str, Any]:
    """One replica, or two; little KV memory, so that twenty callers need both."""
    engine = {
        "blockSize": BLOCK_TOKENS,
        "maxSequences": MAX_SEQUENCES,
        "extraArgs": ["--enforce-eager", "--num-gpu-blocks-override", str(KV_BLOCKS + 1)],
        "resources": {
            "requests": {"cpu": "200m", "memory": "1Gi"},
            "limits": {"cpu": _ENGINE_CORES, "memory": "6Gi"},
        },
    }
    scaling = {"policy": "Native", "minReplicas": 1, "maxReplicas": MOST_REPLICAS, "scaleDownWindowSeconds": 30}
    return cpu_service(NAME, namespace, f"oci://{images.model}", engine=engine, autoscaling=scaling)


def _asked_after_overload(stack: Stack, namespace: str) -> float:
    """Seconds; 0 where it was asked for before the overload was seen here."""
    ip = sidecar.pod_ip(stack, namespace, NAME)
    since: float | None = None
    end = time.monotonic() + 120
    while True:
        if since is None and _too_few(sidecar.state(ip)):
            since = time.monotonic()
        if _asked(stack, namespace) > 1:
            return 0.0 if since is None else time.monotonic() - since
        assert time.monotonic() < end, sidecar.state(ip)
        time.sleep(0.2)


def _too_few(told: Mapping[str, Any]) -> bool:
    """Whether what the only replica tells fills more than one, whatever share of its memory was learned to be usable."""
    state = SidecarState.model_validate(told)
    reading = read(state, pod=state.pod, at=0.0)
    if reading is None:
        return False
    return reading.held_tokens + reading.queued_tokens > Tuning().usable_most * reading.capacity_tokens


def _horizon(prometheus: Prometheus, namespace: str) -> float:
    """The start-up that the operator counts with."""
    selector = f'kvplane_autoscaler_horizon_seconds{{namespace="{namespace}", service="{NAME}"}}'
    return max(sample.value for sample in prometheus.query(f"last_over_time({selector}[1m])"))


def _cut(stack: Stack, cluster: Cluster, prometheus: Prometheus, namespace: str) -> Blind:
    began = int(time.time())
    asked: set[int] = set()
    conditions: set[tuple[str, str, str]] = set()
    with _hidden(stack, cluster, namespace):
        end = time.monotonic() + CUT_SECONDS
        while time.monotonic() < end:
            asked.add(_asked(stack, namespace))
            found = stack.conditions(namespace, NAME).items()
            conditions |= {(kind, each["status"], each["reason"]) for kind, each in found}
            time.sleep(1)
    ended = int(time.time())
    fired = prometheus.fired(start=began, end=ended)
    return Blind(began, ended, frozenset(asked), frozenset(conditions), frozenset(fired))


@contextmanager
def _hidden(stack: Stack, cluster: Cluster, namespace: str) -> Iterator[None]:
    """The operator finds no way to the service's engines; everybody else does, the kubelets and Prometheus too."""
    component = "app.kubernetes.io/component=operator"
    (operator,) = [pod["metadata"]["name"] for pod in stack.get(SYSTEM_NAMESPACE, "pods", "-l", component)]
    ips = [pod["status"]["podIP"] for pod in sidecar.pods(stack, namespace, NAME)]
    for ip in ips:
        cluster.hide(SYSTEM_NAMESPACE, operator, ip)
    try:
        yield
    finally:
        for ip in ips:
            cluster.unhide(SYSTEM_NAMESPACE, operator, ip)


def _seen_again(stack: Stack, namespace: str) -> dict[str, dict[str, Any]]:
    def conditions() -> dict[str, dict[str, Any]]:
        found = stack.conditions(namespace, NAME)
        return {kind: found[kind] for kind in ("SignalsFresh", "ScalingActive")}

    _until(lambda: {each["status"] for each in conditions().values()} == {"True"}, "signals are not back", seconds=60)
    return conditions()


def _gone(stack: Stack, namespace: str, costs: dict[str, int | None]) -> bool:
    """Whether one pod is left; notes what each pod that is going was marked with."""
    found = sidecar.pods(stack, namespace, NAME)
    for metadata in (pod["metadata"] for pod in found if "deletionTimestamp" in pod["metadata"]):
        cost = metadata.get("annotations", {}).get(names.ANNOTATION_DELETION_COST)
        costs[metadata["uid"]] = None if cost is None else int(cost)
    return len(found) == 1


def _wake(stack: Stack, namespace: str) -> float:
    assert _asked(stack, namespace) == 0
    began = time.monotonic()
    stack.kubectl("annotate", "llms", NAME, "-n", namespace, f"{names.ANNOTATION_WAKE}=first")
    _until(lambda: _asked(stack, namespace) == 1, "it was not woken", seconds=30, every=0.1)
    return time.monotonic() - began


def _patch(stack: Stack, namespace: str, spec: Mapping[str, Any]) -> None:
    patch = json.dumps({"spec": spec})
    stack.kubectl("patch", "llms", NAME, "-n", namespace, "--type=merge", f"--patch={patch}")


def _asked(stack: Stack, namespace: str) -> int:
    """Replicas that the Deployment asks for."""
    return int(stack.get(namespace, "deployment", NAME)["spec"]["replicas"])


def _ready(stack: Stack, namespace: str) -> int:
    found = [pod for pod in sidecar.pods(stack, namespace, NAME) if "deletionTimestamp" not in pod["metadata"]]
    conditions = [each for pod in found for each in pod["status"].get("conditions", [])]
    return sum(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def _about(event: Mapping[str, Any]) -> bool:
    about = event["involvedObject"]
    return bool(about["kind"] == names.KIND and about["name"] == NAME)


def _until(holds: Callable[[], bool], otherwise: str, *, seconds: float = _LONGEST_SECONDS, every: float = 0.5) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{otherwise} within {seconds:.0f} s"
        time.sleep(every)
