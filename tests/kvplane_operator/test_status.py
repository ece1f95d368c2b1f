"""What the conditions say in each state that pods and children can be in; every reason of the API is reached here."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from kvplane_api.conditions import MEANINGS, MESSAGE_LIMIT, Type
from kvplane_operator.plan.snapshot import Blocked, Obstacle, Reading, Scaler, Scaling
from kvplane_operator.plan.status import status_patch
from tests.kvplane_operator.ring_world import RING, RingWorld, formed
from tests.kvplane_operator.world import (
    DEPLOYMENT,
    HF,
    NATIVE,
    RUNNING,
    World,
    crashed,
    pod,
    settings,
    settled,
    state,
    waiting,
)

FACTS = {"layers": 80, "kvHeads": 8, "headDim": 128, "parameters": 70_000_000_000, "acceleratorMemory": "80Gi"}
SURGE_TEXT = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."
QUOTA_TEXT = 'pods "chat-2" is forbidden: exceeded quota: gpus'
REFUSED_TEXT = 'pods "chat-1" is forbidden: violates PodSecurity "restricted:latest"'


def serving(
    replicas: int = 1, *, ready: int | None = None, updated: int | None = None, asked: int | None = None
) -> World:
    world = settled({**HF, "replicas": replicas if asked is None else asked})
    world.counts(replicas=replicas, ready=replicas if ready is None else ready, updated=updated)
    world.pods = [pod(f"chat-{n}", ready=True, engine=RUNNING) for n in range(replicas if ready is None else ready)]
    return world


def starting(found: dict[str, Any] | None = None, **spec: Any) -> World:
    """One pod that does not serve yet."""
    world = settled({**HF, **spec})
    world.counts(replicas=1, ready=0)
    world.pods = [found or pod()]
    return world


def rolling(found: dict[str, Any]) -> World:
    """The old pod serves, one new pod is there."""
    world = serving(2, ready=1, updated=1, asked=1)
    world.pods.append(found)
    return world


def blocked(obstacle: Obstacle, message: str) -> World:
    world = World()
    world.blocked = (Blocked(DEPLOYMENT, obstacle, message, generation=1),)
    return world


def read(found: Reading) -> World:
    """One pod serves, and this was read of it."""
    world = serving()
    world.readings = {"chat-0": found}
    return world


def refused_pods() -> World:
    world = settled()
    failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": REFUSED_TEXT}
    world.counts(replicas=0, ready=0, conditions=[failure])
    return world


def quota_hit() -> World:
    """One of two pods serves, and there will not be another one."""
    world = serving(2, ready=1)
    failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": QUOTA_TEXT}
    world.counts(replicas=1, ready=1, conditions=[failure])
    return world


def ring_without(
    rank: int, *, exits: int = 1, groups: int = 1, steps: int = 1, log: str = "INFO loading\nOSError: no such model"
) -> RingWorld:
    """Rings of three; the engine of this rank of the first one exits so often and stays down."""
    world = formed({**RING, "replicas": groups})
    world.log = log
    world.crash(0, rank, times=exits)
    return world.run(steps)


def changing_mode() -> RingWorld:
    """A ring serves, and is to be paged."""
    world = formed()
    del world.spec["ring"]
    world.change(mode="Paged")
    return world.run(1)


def scaled(spec: Mapping[str, Any] = NATIVE, *scalers: Scaler, **says: Any) -> World:
    """Of this the autoscaler says one replica and what else is given; these scale too."""
    world = settled(spec)
    world.scaling = Scaling(mode="Paged", **{"desired": 1, **says})
    world.scalers = scalers
    return world


OOM = crashed(137, reason="OOMKilled")
CRASH = crashed(1, restarts=3, log="INFO loading\nOSError: acme/tiny is not a model")
LATE = crashed(137, seconds=3605)
RENAMED = "kv_cache_usage_ratio (vllm:kv_cache_usage_perc, vllm:gpu_cache_usage_perc)"

# state -> (world, type, status, reason, a part of the message)
STATES: dict[str, tuple[Callable[[], World], str, str, str, str]] = {
    "accepted": (settled, "Accepted", "True", "Valid", "The spec is valid."),
    "spec of a newer CRD": (
        lambda: World({**HF, "hybrid": {"size": 2}}),
        "Accepted",
        "False",
        "InvalidSpec",
        "spec.hybrid: Extra inputs are not permitted. If the field is new, upgrade the operator",
    ),
    "context too long for one replica": (
        lambda: World(
            {"model": {"source": "hf://a/b", "facts": FACTS}, "context": {"maxTokens": 65_536}, "mode": "Paged"}
        ),
        "Accepted",
        "False",
        "ContextExceedsCapacity",
        "context.maxTokens is 65536, and by model.facts one replica holds 0 tokens",
    ),
    "ring without an image": (
        lambda: World(RING, settings=settings(ring_image="")),
        "Accepted",
        "False",
        "RingNotAvailable",
        "mode is Ring. This installation has no image of the ring engine: set ring.image",
    ),
    "auto chose what a ring cannot do": (
        lambda: World({**HF, "context": {"maxTokens": 100_001}}),
        "Accepted",
        "False",
        "UnsupportedByRing",
        "context.maxTokens is 100001, above context.ringThresholdTokens (100000). The ring engine does not take an hf://",
    ),
    "auto chose a ring of unknown size": (
        lambda: World({"model": {"source": "pvc://m"}, "context": {"maxTokens": 100_001}}),
        "Accepted",
        "False",
        "RingSizeUnknown",
        "Nothing says how many ranks a ring needs: set ring.size, or give model.facts.",
    ),
    "ring too small by its facts": (
        lambda: World(
            {"model": {"source": "pvc://m", "facts": FACTS}, "context": {"maxTokens": 65_536}, "ring": {"size": 2}}
        ),
        "Accepted",
        "False",
        "ContextExceedsCapacity",
        "so a ring of any size holds none: use accelerators with more memory, or a smaller model.",
    ),
    "path source": (
        lambda: World({"model": {"source": "path:///srv/m"}}),
        "Accepted",
        "False",
        "PathNotAllowed",
        "install the chart with security.allowPathSources=true",
    ),
    "foreign child": (
        lambda: blocked(Obstacle.CONFLICT, "Deployment chat exists."),
        "Accepted",
        "False",
        "ChildConflict",
        "Deployment chat exists.",
    ),
    "refused child": (lambda: blocked(Obstacle.REJECTED, "No."), "Accepted", "False", "ChildRejected", "No."),
    "serving": (serving, "Available", "True", "MinimumReplicasAvailable", "1 of 1 replicas serve."),
    "scaled to zero": (
        lambda: settled({**HF, "replicas": 0}),
        "Available",
        "False",
        "ScaledToZero",
        "kubectl scale brings it back",
    ),
    "scaled to zero by itself": (
        lambda: scaled(desired=0),
        "Available",
        "False",
        "ScaledToZero",
        "a new value of the annotation kvplane.dev/wake brings it back",
    ),
    "no pod yet": (settled, "Available", "False", "Starting", "The pods are being created."),
    "pulling": (starting, "Available", "False", "Starting", "Pod chat-1 on node-1 pulls its images and volumes."),
    "loading": (
        lambda: starting(pod(engine=RUNNING)),
        "Available",
        "False",
        "Starting",
        "Pod chat-1 on node-1 loads the model.",
    ),
    "waiting for the scheduler": (
        lambda: starting(pod(node=None)),
        "Available",
        "False",
        "Starting",
        "Pod chat-1 is being scheduled.",
    ),
    "no node fits": (
        lambda: starting(pod(unscheduled=SURGE_TEXT)),
        "Available",
        "False",
        "Unschedulable",
        f"Pod chat-1 waits for a node: {SURGE_TEXT}",
    ),
    "claim missing": (
        lambda: starting(pod(unscheduled='persistentvolumeclaim "models" not found')),
        "Available",
        "False",
        "VolumeNotReady",
        '"models" not found',
    ),
    "volume of a container": (
        lambda: starting(pod(engine=waiting("CreateContainerError", "failed to prepare volume"))),
        "Available",
        "False",
        "VolumeNotReady",
        "container engine: failed to prepare volume",
    ),
    "image missing": (
        lambda: starting(pod(engine=waiting("ErrImagePull", "not found"))),
        "Available",
        "False",
        "ImagePullFailed",
        "Pod chat-1 cannot pull e: not found",
    ),
    "image missing for long": (
        lambda: starting(pod(sidecar=waiting("ImagePullBackOff"))),
        "Available",
        "False",
        "ImagePullFailed",
        "Pod chat-1 cannot pull s: ImagePullBackOff",
    ),
    "secret missing": (
        lambda: starting(pod(engine=waiting("CreateContainerConfigError", 'secret "hub" not found'))),
        "Available",
        "False",
        "ContainerConfigError",
        'Pod chat-1, container engine: secret "hub" not found',
    ),
    "engine crashes": (
        lambda: starting(pod(engine=CRASH)),
        "Available",
        "False",
        "EngineCrashed",
        "exited with code 1 (3 restarts). Last log lines:\nINFO loading\nOSError: acme/tiny is not a model",
    ),
    "engine crashed and runs again": (
        lambda: starting(pod(engine={**CRASH, **RUNNING})),
        "Available",
        "False",
        "EngineCrashed",
        "exited with code 1 (3 restarts).",
    ),
    "pod evicted": (
        lambda: starting(pod(phase="Failed", message="Usage of EmptyDir volume exceeds the limit 1Gi.")),
        "Available",
        "False",
        "EngineCrashed",
        "Pod chat-1 failed: Usage of EmptyDir volume exceeds the limit 1Gi.",
    ),
    "sidecar crashes": (
        lambda: starting(pod(sidecar=crashed(2))),
        "Available",
        "False",
        "SidecarCrashed",
        "container kvplane-sidecar exited with code 2 (1 restarts).",
    ),
    "memory": (
        lambda: starting(pod(engine=OOM)),
        "Available",
        "False",
        "OOMKilled",
        "was killed for memory (1 restarts); raise its memory limit in engine.resources",
    ),
    "start takes too long": (
        lambda: starting(pod(engine=LATE)),
        "Available",
        "False",
        "StartupTimedOut",
        "did not answer within engine.startupTimeoutSeconds (3600 s) and was ended (1 restarts)",
    ),
    "killed long after its start": (
        lambda: starting(pod(engine=crashed(137, seconds=9000))),
        "Available",
        "False",
        "EngineCrashed",
        "exited with code 137",
    ),
    "every ring given up": (
        lambda: ring_without(0, exits=6, steps=8),
        "Available",
        "False",
        "RestartBudgetExhausted",
        "Ring group 0 had 6 exits, more than ring.recovery.restartBudget (5), and was given up;",
    ),
    "pods refused": (refused_pods, "Available", "False", "PodsRefused", REFUSED_TEXT),
    "nothing accepted": (
        lambda: World({"model": {"source": "path:///srv/m"}}),
        "Available",
        "False",
        "NotReconciled",
        "Nothing runs: model.source is path:///srv/m",
    ),
    "rolling out": (
        lambda: rolling(pod("chat-new", engine=RUNNING)),
        "Progressing",
        "True",
        "RollingOut",
        "1 of 1 replicas have the newest template.",
    ),
    "scaling": (
        lambda: serving(1, asked=3),
        "Progressing",
        "True",
        "Scaling",
        "1 of 3 replicas are available.",
    ),
    "stable": (serving, "Progressing", "False", "Stable", "Everything asked for is there."),
    "no room for the surge pod": (
        lambda: rolling(pod("chat-new", unscheduled=SURGE_TEXT)),
        "Progressing",
        "False",
        "NoRoomForSurge",
        "free some, or set rollout.maxSurge: 0 and maxUnavailable: 1",
    ),
    "new pods crash": (
        lambda: rolling(pod("chat-new", engine=CRASH)),
        "Progressing",
        "False",
        "RolloutStalled",
        "The old pods serve on. Pod chat-new, container engine exited",
    ),
    "new pods cannot be pulled": (
        lambda: rolling(pod("chat-new", engine=waiting("ErrImagePull"))),
        "Progressing",
        "False",
        "RolloutStalled",
        "The old pods serve on. Pod chat-new cannot pull",
    ),
    "a ring forms anew": (
        lambda: ring_without(1),
        "Progressing",
        "True",
        "ReForming",
        "Ring group 0 has 2 of 3 ranks in its ring.",
    ),
    "mode changes": (
        changing_mode,
        "Progressing",
        "True",
        "ChangingMode",
        "Mode Ring serves until mode Paged has its replicas ready: 0 of 1.",
    ),
    "as asked": (serving, "Degraded", "False", "AsAsked", "Nothing is missing."),
    "a replica is missing": (
        lambda: serving(2, ready=1),
        "Degraded",
        "True",
        "ReplicasMissing",
        "1 of 2 replicas serve.",
    ),
    "a quota keeps a replica away": (
        quota_hit,
        "Degraded",
        "True",
        "ReplicasMissing",
        f"1 of 2 replicas serve. The API server refuses further pods: {QUOTA_TEXT}",
    ),
    "a replica crashes": (
        lambda: rolling(pod("chat-new", engine=CRASH)),
        "Degraded",
        "True",
        "CrashLooping",
        "acme/tiny is not a model",
    ),
    "a ring with a rank less": (
        lambda: ring_without(1),
        "Degraded",
        "True",
        "RingDegraded",
        "Ring group 0 serves with 2 of 3 ranks. Pod chat-ring-0-1, container engine exited with code 1",
    ),
    "a ring given up beside one that serves": (
        lambda: ring_without(0, exits=6, groups=2, steps=8),
        "Degraded",
        "True",
        "RestartBudgetExhausted",
        "Last log lines:\nINFO loading\nOSError: no such model",
    ),
    "admission without its signals": (
        lambda: read(Reading(state("chat-0", missingSignals=[RENAMED]))),
        "Degraded",
        "True",
        "AdmissionImpaired",
        f"the engine's metrics lack {RENAMED}",
    ),
    "nothing serves": (starting, "Degraded", "False", "NotServing", "see Available"),
    "signals read": (
        lambda: read(Reading(state("chat-0"))),
        "SignalsFresh",
        "True",
        "SignalsRead",
        "All signals of the pods that serve are there, and fresh.",
    ),
    "signal renamed": (
        lambda: read(Reading(state("chat-0", missingSignals=[RENAMED]))),
        "SignalsFresh",
        "False",
        "SignalMissing",
        f"Pod chat-0: the engine's metrics lack {RENAMED}. In brackets: the names that were looked for.",
    ),
    "signals stale": (
        lambda: read(Reading(state("chat-0", signalAgeSeconds=11))),
        "SignalsFresh",
        "False",
        "SignalsStale",
        "Pod chat-0: the sidecar could not read the engine's metrics for more than 10 s",
    ),
    "sidecar unreachable": (
        lambda: read(Reading(None, silent=3, error="http://10.0.0.1:8001/state does not answer within 2 s")),
        "SignalsFresh",
        "False",
        "SidecarUnreachable",
        "The state of pod chat-0 cannot be read: http://10.0.0.1:8001/state does not answer within 2 s.",
    ),
    "another pod answers": (
        lambda: read(Reading(state("mail-7"))),
        "SignalsFresh",
        "False",
        "PodMismatch",
        "At the address of pod chat-0 answers pod mail-7; its figures are not counted.",
    ),
    "not read yet": (serving, "SignalsFresh", "Unknown", "SignalsPending", "not read yet"),
    "nothing to read": (starting, "SignalsFresh", "Unknown", "NoServingPods", "No pod serves"),
    "the autoscaler acts": (
        scaled,
        "ScalingActive",
        "True",
        "FollowsDemand",
        "Between 1 and 8 replicas run, as demand needs.",
    ),
    "more are needed than may be": (
        lambda: scaled(at_maximum=True),
        "ScalingActive",
        "True",
        "AtMaximum",
        "Demand needs more than autoscaling.maxReplicas, 8.",
    ),
    "an HPA of a service that scales itself": (
        lambda: scaled(NATIVE, Scaler("keda-hpa-chat", "LLMService", "chat")),
        "ScalingActive",
        "True",
        "ForeignScalerIgnored",
        "HorizontalPodAutoscaler keda-hpa-chat writes spec.replicas, which autoscaling.policy Native does not read.",
    ),
    "the autoscaler is blind": (
        lambda: scaled(blind="Signals of chat-0 are missing."),
        "ScalingActive",
        "False",
        "ScalerBlind",
        "Signals of chat-0 are missing.",
    ),
    "an HPA of the Deployment": (
        lambda: scaled(HF, Scaler("theirs", "Deployment", "chat")),
        "ScalingActive",
        "False",
        "ForeignScaler",
        "HorizontalPodAutoscaler theirs targets Deployment chat, which belongs to this service. Delete it, or point it at "
        "LLMService chat and set autoscaling.policy: External.",
    ),
    "nothing scales": (serving, "ScalingActive", "Unknown", "ScalingOff", "spec.replicas stands"),
    "somebody else is to scale": (
        lambda: scaled({**HF, "autoscaling": {"policy": "External"}}, Scaler("theirs", "LLMService", "chat")),
        "ScalingActive",
        "Unknown",
        "ScaledExternally",
        "spec.replicas is left to an external scaler.",
    ),
    "not decided yet": (
        lambda: settled(NATIVE),
        "ScalingActive",
        "Unknown",
        "ScalingPending",
        "the replicas that there are stay",
    ),
    "ready": (serving, "Ready", "True", "Serving", "1 of 1 replicas serve."),
}


@pytest.mark.parametrize("state", STATES)
def test_states(state: str) -> None:
    world, kind, status, reason, text = STATES[state]
    found = world().wanted(kind)
    assert (found["status"], found["reason"]) == (status, reason)
    assert text in found["message"]


def test_every_reason_is_reached() -> None:
    reached = {(kind, status, reason) for _, kind, status, reason, _ in STATES.values()}
    assert reached == {(m.type.value, m.status, m.reason.value) for m in MEANINGS}


@pytest.mark.parametrize("state", STATES)
def test_all_conditions_stand_from_the_first_sight(state: str) -> None:
    conditions = STATES[state][0]().plan().status["conditions"]
    assert [c["type"] for c in conditions] == [kind.value for kind in Type]


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("path source", "PathNotAllowed"),
        ("engine crashes", "EngineCrashed"),
        ("a replica is missing", "ReplicasMissing"),
        ("no room for the surge pod", "NoRoomForSurge"),
        ("admission without its signals", "AdmissionImpaired"),
        ("every ring given up", "RestartBudgetExhausted"),
        ("a ring with a rank less", "RingDegraded"),
    ],
)
def test_ready_repeats_what_keeps_it_false(state: str, reason: str) -> None:
    assert STATES[state][0]().condition("Ready") == ("False", reason)


def test_a_rollout_that_goes_well_leaves_the_service_ready() -> None:
    assert rolling(pod("chat-new", engine=RUNNING)).condition("Ready") == ("True", "Serving")


def test_a_refused_spec_leaves_what_runs_serving() -> None:
    world = serving()
    world.change(context={"maxTokens": 200_000})
    plan = world.plan()
    assert (plan.writes, plan.deletions) == ((), ())
    assert world.condition("Accepted") == ("False", "UnsupportedByRing")
    assert world.condition("Available") == ("True", "MinimumReplicasAvailable")


def test_an_unreadable_spec_leaves_what_runs_serving() -> None:
    world = serving()
    world.change(hybrid={"size": 2})
    plan = world.plan()
    assert (plan.writes, plan.deletions) == ((), ())
    assert plan.status["desiredReplicas"] == 1
    assert world.condition("Available") == ("True", "MinimumReplicasAvailable")


def test_the_most_telling_pod_is_shown() -> None:
    world = starting(replicas=3)
    world.pods = [pod("chat-a"), pod("chat-b", unscheduled=SURGE_TEXT), pod("chat-c", engine=OOM)]
    assert world.condition("Available") == ("False", "OOMKilled")


def test_pods_that_go_are_not_findings() -> None:
    going = pod(engine=CRASH)
    going["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
    assert starting(going).condition("Available") == ("False", "Starting")


def test_a_pod_that_is_over_is_forgotten_once_another_one_serves() -> None:
    """A kubelet that evicts it, or refuses it, leaves its object; the ReplicaSet has made another one long since."""
    world = serving()
    world.pods.append(pod("chat-evicted", phase="Failed", message="Usage of EmptyDir volume exceeds the limit 1Gi."))
    assert world.condition("Degraded") == ("False", "AsAsked")
    assert world.condition("Ready") == ("True", "Serving")
    world.counts(replicas=2, ready=1, updated=1)
    assert world.condition("Progressing") == ("True", "RollingOut")
    assert world.condition("Ready") == ("True", "Serving")
    world.counts(replicas=1, ready=0)
    assert "Pod chat-evicted failed: Usage of EmptyDir" in world.wanted("Available")["message"]


def test_a_crash_is_forgotten_once_the_pod_serves() -> None:
    world = serving()
    world.pods = [pod(ready=True, engine={**CRASH, **RUNNING})]
    assert world.condition("Degraded") == ("False", "AsAsked")


def test_a_crash_shows_the_last_lines_only() -> None:
    log = "\n".join(f"line {n}" for n in range(100))
    message = starting(pod(engine=crashed(1, log=log))).wanted("Available")["message"]
    assert "line 99" in message
    assert "line 80" not in message


@pytest.mark.parametrize(
    ("world", "kind"),
    [
        (lambda log: starting(pod(engine=crashed(1, log=log))), "Available"),
        (lambda log: rolling(pod("chat-new", engine=crashed(1, log=log))), "Progressing"),
        (lambda log: ring_without(0, exits=6, steps=8, log=log), "Available"),
    ],
)
def test_of_a_long_log_the_end_is_shown(world: Callable[[str], World], kind: str) -> None:
    """The kubelet gives 2 KiB of it, as much as a message may be long, and the cause stands last."""
    log = "\n".join([*(f"{n} {'x' * 195}" for n in range(10)), "OSError: acme/tiny is not a model"])
    message = world(log).wanted(kind)["message"]
    assert len(message) <= MESSAGE_LIMIT
    assert message.endswith("OSError: acme/tiny is not a model")


@pytest.mark.parametrize(
    ("observed", "wanted", "patch"),
    [
        ({"a": 1, "b": [1]}, {"a": 1, "b": [1]}, {}),
        ({"a": 1, "others": 2}, {"a": 2}, {"a": 2}),
        ({}, {"a": None}, {}),
        ({"a": 1}, {"a": None}, {"a": None}),
        ({"a": {"x": 1, "y": 2}}, {"a": {"x": 1, "y": 2}}, {}),
        ({"a": {"x": 1, "y": 2}}, {"a": {"x": 3}}, {"a": {"x": 3, "y": None}}),  # else a merge would keep y
        ({}, {"a": {"x": 1}}, {"a": {"x": 1}}),
        ({"a": {"x": 1}}, {"a": None}, {"a": None}),
        ({"a": [{"x": 1, "y": 2}]}, {"a": [{"x": 1}]}, {"a": [{"x": 1}]}),
    ],
)
def test_the_patch_has_what_differs(observed: dict[str, Any], wanted: dict[str, Any], patch: dict[str, Any]) -> None:
    assert status_patch(observed, wanted) == patch


def test_counts_and_addresses() -> None:
    world = serving(2, ready=1)
    status = world.plan().status
    assert (status["replicas"], status["readyReplicas"], status["desiredReplicas"]) == (2, 1, 2)
    assert status["pools"] == [{"name": "chat", "kind": "Paged", "replicas": 2, "ready": 1}]
    assert status["endpoint"] == "http://chat.team.svc:8000/v1"
    assert status["selector"] == "kvplane.dev/pool=paged,kvplane.dev/service=chat"
    assert status["observedGeneration"] == world.generation
