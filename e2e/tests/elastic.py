"""One service that scales by itself: from zero to two, blind for a minute, down to one, up again, to zero, and awake.

It happens once, as it takes minutes, and in the order that needs one wait for engines: two wake up side by side, one of
them is too many and may go only when the operator sees again, the other gets the overload, and a third is asked for and
called off before it has loaded anything. Two engines at most run at once, and share 1.2 cores, so that the nodes' kubelets
keep enough.

While they start the operator is told that starts take five seconds, and restarted: the way down waits for two of them. From
then on a light load goes on almost without a pause, so that the service is always a busy one, and whatever is lost on the way
down is seen.

A replica that is asked for under load and takes over its part needs minutes more: `make bench-autoscaling-spot`, which uses what
is here.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from e2e.cluster.api import Json
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
from kvplane_operator.autoscaler.startup import SAMPLES
from kvplane_operator.plan.scaling import state_ref
from kvplane_operator.scaling import KEY_STATE, KEY_WOKEN

NAME: Final = "elastic"
ALERT: Final = "KVPlaneAutoscalerBlind"
MOST_REPLICAS: Final = 2
CUT_SECONDS: Final = 60.0
FREE_SECONDS: Final = 10.0
"""Of the cut, in which a replica would go if the operator saw."""
_LONGEST_CUT_SECONDS: Final = 120.0
_NEVER_SECONDS: Final = 3600
_WINDOW_SECONDS: Final = 20
_ZERO_AFTER_SECONDS: Final = 10
_STARTUP_SECONDS: Final = 5.0
"""What the operator is told of starts; two that take longer are too few for a 90th percentile."""
_STEP_SECONDS: Final = 5.0
"""Of the step, after its replica was asked for."""
_ENGINE_CORES: Final = "600m"
_LONGEST_SECONDS: Final = 300.0
"""For anything; two starts side by side, on 0.6 cores each, take 75 s."""
_OPERATOR: Final = "app.kubernetes.io/component=operator"


@dataclass(frozen=True)
class Blind:
    """The minute in which the operator finds no way to the engines."""

    began: int
    ended: int
    free_seconds: float
    """For how long of it one replica would have gone, had the operator seen."""
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
    """All the way down, and beside the step."""
    blind: Blind
    seen_again: Mapping[str, Mapping[str, Any]]
    """The conditions when the way was there again, as soon as both were as before."""
    victim_cost: int | None
    """pod-deletion-cost of the pod that went; None: it had none, or was not seen going."""
    wake_seconds: tuple[float, float]
    """From the annotation to a Deployment of minReplicas: of the service that was never used, and of the one that was."""
    answer: Mapping[str, Any]
    """To a request after the first wake-up."""
    events: tuple[tuple[str, str], ...]
    """Reason and message of each of its events."""


def run(stack: Stack, cluster: Cluster, images: Images, prometheus: Prometheus, namespace: str) -> Elastic:
    """Let it happen."""
    began = int(time.time())
    stack.apply(service(namespace, images))
    until(lambda: stack.conditions(namespace, NAME).get("ScalingActive", {}).get("status") == "True", "undecided")
    until(lambda: bool(stack.get(namespace, "deployment", NAME)), "no Deployment")
    first_wake = _wake(stack, cluster, namespace, "first", replicas=MOST_REPLICAS)
    _scale(stack, namespace, minReplicas=1)
    _shorten_starts(stack, prometheus, namespace)
    stack.wait_ready(namespace, NAME)
    reachable(stack, namespace, NAME)
    where = address(stack, namespace, NAME)
    answer = complete(where, NAME, max_tokens=4)
    with light_load(where) as light:
        until(lambda: max(_told(prometheus, namespace, "requests"), default=0.0) > 0, "its requests are not seen")
        blind = _cut(stack, cluster, prometheus, namespace)
        seen_again = _seen_again(stack, namespace)
        costs: dict[str, int | None] = {}
        until(lambda: _gone(stack, namespace, costs), "two replicas did not become one")
        time.sleep(2)
        ip = sidecar.pod_ip(stack, namespace, NAME)
        with step_load(where) as step:
            asked_seconds = asked_after_overload(cluster, namespace, ip)
            # Enough is known: it is called off before its engine takes the cores.
            _scale(stack, namespace, maxReplicas=1, scaleToZeroAfterSeconds=_ZERO_AFTER_SECONDS)
            time.sleep(_STEP_SECONDS)
    until(lambda: not sidecar.pods(stack, namespace, NAME), "it did not go to zero")
    second_wake = _wake(stack, cluster, namespace, "second", replicas=1)
    until(lambda: [reason for reason, _ in events(stack, namespace)].count("Woken") == 2, "no event", seconds=30)
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
        wake_seconds=(first_wake, second_wake),
        answer=answer,
        events=events(stack, namespace),
    )


def service(namespace: str, images: Images, *, replicas: int = 0, **autoscaling: int) -> dict[str, Any]:
    """Asleep; two replicas when it wakes up; little KV memory, so that twenty callers are too many for one. ``autoscaling``: fields
    that go over what it says."""
    engine = {
        "blockSize": BLOCK_TOKENS,
        "maxSequences": MAX_SEQUENCES,
        "extraArgs": ["--enforce-eager", "--num-gpu-blocks-override", str(KV_BLOCKS + 1)],
        "resources": {
            "requests": {"cpu": "200m", "memory": "1Gi"},
            "limits": {"cpu": _ENGINE_CORES, "memory": "6Gi"},
        },
    }
    scaling: dict[str, Any] = {
        "policy": "Native",
        "minReplicas": MOST_REPLICAS,
        "maxReplicas": MOST_REPLICAS,
        "scaleToZeroAfterSeconds": _NEVER_SECONDS,
        "scaleDownWindowSeconds": _NEVER_SECONDS,
        **autoscaling,
    }
    return cpu_service(NAME, namespace, f"oci://{images.model}", engine=engine, replicas=replicas, autoscaling=scaling)


def light_load(where: str) -> Load:
    """A few callers, far from filling one replica."""
    return Load(where, NAME, workers=3, max_tokens=100, pause_seconds=0.1)


def step_load(where: str) -> Load:
    """Twice as many callers as one replica has room for."""
    return Load(where, NAME, workers=20, prompt_tokens=64, min_tokens=120, max_tokens=360)


def _shorten_starts(stack: Stack, prometheus: Prometheus, namespace: str) -> None:
    """Write short starts into what the operator keeps of this service, and have it read that: as after any restart."""
    name = state_ref(NAME).name

    def kept() -> dict[str, str]:
        found = stack.get(namespace, "configmap", name) or {}
        data: dict[str, str] = found.get("data", {})
        return data

    until(lambda: kept().get(KEY_WOKEN) == "first", "the wake-up was not kept", seconds=30)
    learned = json.loads(kept()[KEY_STATE]) | {"starts_pulled": [_STARTUP_SECONDS] * SAMPLES}
    patch = json.dumps({"data": {KEY_STATE: json.dumps(learned)}})
    stack.kubectl("patch", "configmap", name, "-n", namespace, "--type=merge", f"--patch={patch}")
    stack.kubectl("delete", "pods", "-n", SYSTEM_NAMESPACE, "-l", _OPERATOR)
    horizon = _STARTUP_SECONDS + Tuning().tick_seconds
    until(lambda: horizon in _told(prometheus, namespace, "horizon_seconds"), "what was kept is not read")


def asked_after_overload(cluster: Cluster, namespace: str, ip: str) -> float:
    """Seconds from the first look at the only replica, at that address, that shows too much for one, to a Deployment of two; 0
    where this was seen first."""
    since: float | None = None
    end = time.monotonic() + 120
    while True:
        if since is None and _too_few(sidecar.state(ip)):
            since = time.monotonic()
        if asked(cluster, namespace) > 1:
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


def _told(prometheus: Prometheus, namespace: str, figure: str) -> list[float]:
    """What operators export of the service now."""
    selector = f'kvplane_autoscaler_{figure}{{namespace="{namespace}", service="{NAME}"}}'
    return [sample.value for sample in prometheus.query(selector)]


def _cut(stack: Stack, cluster: Cluster, prometheus: Prometheus, namespace: str) -> Blind:
    """As soon as it is blind, and says so, only that keeps the second replica; the cut lasts until the alert fires too."""
    began, start = int(time.time()), time.monotonic()
    seen: set[int] = set()
    conditions: set[tuple[str, str, str]] = set()
    free_since: float | None = None

    def over() -> bool:
        now = time.monotonic()
        if now - start > _LONGEST_CUT_SECONDS:
            return True
        free = free_since is not None and now - free_since > FREE_SECONDS
        return now - start > CUT_SECONDS and free and (ALERT, namespace, NAME) in prometheus.firing()

    with _hidden(stack, cluster, namespace):
        while not over():
            seen.add(asked(cluster, namespace))
            found = stack.conditions(namespace, NAME).items()
            conditions |= {(kind, each["status"], each["reason"]) for kind, each in found}
            if free_since is None and ("ScalingActive", "False", "ScalerBlind") in conditions:
                _scale(stack, namespace, scaleDownWindowSeconds=_WINDOW_SECONDS)
                free_since = time.monotonic()
            time.sleep(1)
        seen.add(asked(cluster, namespace))
        free_seconds = 0.0 if free_since is None else time.monotonic() - free_since
    ended = math.ceil(time.time())  # not before the last evaluation
    fired = prometheus.fired(start=began, end=ended)
    return Blind(began, ended, free_seconds, frozenset(seen), frozenset(conditions), frozenset(fired))


@contextmanager
def _hidden(stack: Stack, cluster: Cluster, namespace: str) -> Iterator[None]:
    """The operator finds no way to the service's engines; everybody else does, the kubelets and Prometheus too."""
    (operator,) = [pod["metadata"]["name"] for pod in stack.get(SYSTEM_NAMESPACE, "pods", "-l", _OPERATOR)]
    ips = [pod["status"]["podIP"] for pod in sidecar.pods(stack, namespace, NAME)]
    for ip in ips:
        cluster.hide(SYSTEM_NAMESPACE, operator, ip)
    try:
        yield
    finally:
        for ip in ips:
            cluster.unhide(SYSTEM_NAMESPACE, operator, ip)


def _seen_again(stack: Stack, namespace: str) -> dict[str, dict[str, Any]]:
    conditions: dict[str, dict[str, Any]] = {}

    def are_back() -> bool:
        found = stack.conditions(namespace, NAME)
        conditions.update({kind: found[kind] for kind in ("SignalsFresh", "ScalingActive")})
        return {each["status"] for each in conditions.values()} == {"True"}

    until(are_back, "signals are not back", seconds=60)
    return conditions


def _gone(stack: Stack, namespace: str, costs: dict[str, int | None]) -> bool:
    """Whether one pod is left; notes what each pod that is going was marked with."""
    found = sidecar.pods(stack, namespace, NAME)
    for metadata in (pod["metadata"] for pod in found if "deletionTimestamp" in pod["metadata"]):
        cost = metadata.get("annotations", {}).get(names.ANNOTATION_DELETION_COST)
        costs[metadata["uid"]] = None if cost is None else int(cost)
    return len(found) == 1


def _wake(stack: Stack, cluster: Cluster, namespace: str, value: str, *, replicas: int) -> float:
    assert asked(cluster, namespace) == 0
    began = time.monotonic()
    stack.kubectl("annotate", "llms", NAME, "-n", namespace, "--overwrite", f"{names.ANNOTATION_WAKE}={value}")
    until(lambda: asked(cluster, namespace) == replicas, "it was not woken", seconds=30, every=0.1)
    return time.monotonic() - began


def _scale(stack: Stack, namespace: str, **autoscaling: int) -> None:
    """Change these fields of spec.autoscaling."""
    patch = json.dumps({"spec": {"autoscaling": autoscaling}})
    stack.kubectl("patch", "llms", NAME, "-n", namespace, "--type=merge", f"--patch={patch}")


def asked(cluster: Cluster, namespace: str) -> int:
    """Replicas that the Deployment asks for."""
    return int(_deployment(cluster, namespace)["spec"]["replicas"])


def ready(cluster: Cluster, namespace: str) -> int:
    """Replicas that serve, as the Deployment counts them."""
    return int(_deployment(cluster, namespace)["status"].get("readyReplicas", 0))


def _deployment(cluster: Cluster, namespace: str) -> Json:
    """Not by kubectl, which takes a part of a second of a core that engines need."""
    return cluster.api.get(f"/apis/apps/v1/namespaces/{namespace}/deployments/{NAME}")


def events(stack: Stack, namespace: str) -> tuple[tuple[str, str], ...]:
    """Reason and message of each event about the service."""
    found = ((event["involvedObject"], event) for event in stack.get(namespace, "events"))
    return tuple(
        (event["reason"], event["message"])
        for about, event in found
        if (about["kind"], about["name"]) == (names.KIND, NAME)
    )


def until(holds: Callable[[], bool], otherwise: str, *, seconds: float = _LONGEST_SECONDS, every: float = 0.5) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{otherwise} within {seconds:.0f} s"
        time.sleep(every)
