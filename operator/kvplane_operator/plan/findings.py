"""What the pods of a service say about why they do not serve: one finding per pod, the most telling first.

Restarts are read from restartCount and the last termination before looking at readiness: a container that crashes and
comes back between two looks is a crash, not a slow start.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from kvplane_api import names
from kvplane_api.conditions import Reason

_LOG_LINES = 12
"""Last lines of a crashed container's log that are shown in a condition."""

_LOG_CHARACTERS = 1536
"""Of these lines, as many as leave room for what stands before them: a message that is too long is cut at its end, where a log
says most."""

_STARTUP_KILL_SECONDS = 60
"""How long after startupTimeoutSeconds a container that the startup probe ends is gone: rounding to whole probe periods,
the probe's grace, a slow kubelet. One that was killed later had come up before."""

_MOST_TELLING: Final = (
    Reason.OUT_OF_MEMORY,
    Reason.STARTUP_TIMED_OUT,
    Reason.ENGINE_CRASHED,
    Reason.SIDECAR_CRASHED,
    Reason.IMAGE_PULL_FAILED,
    Reason.CONTAINER_CONFIG_ERROR,
    Reason.VOLUME_NOT_READY,
    Reason.UNSCHEDULABLE,
    Reason.STARTING,
)
_PULL_PROBLEMS: Final = frozenset(
    {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable"}
)
_CONFIG_PROBLEMS: Final = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})


@dataclass(frozen=True)
class Finding:
    """Why one pod does not serve."""

    pod: str
    reason: Reason
    message: str

    @property
    def crash(self) -> bool:
        """Whether a container of the pod exited."""
        return self.reason in _MOST_TELLING[:4]


def ready(pod: Mapping[str, Any]) -> bool:
    """Whether the pod serves: Ready and not on its way out."""
    return not pod["metadata"].get("deletionTimestamp") and pod_condition(pod, "Ready").get("status") == "True"


def over(pod: Mapping[str, Any]) -> bool:
    """Whether the pod has ended for good, as one that was evicted: it stays as an object, and a ReplicaSet makes another one."""
    return pod["status"].get("phase") in ("Succeeded", "Failed")


def findings(pods: tuple[Mapping[str, Any], ...], *, startup_timeout_seconds: int) -> list[Finding]:
    """One finding for each pod that does not serve (or serves after a crash), the most telling first."""
    found = []
    for pod in pods:
        if pod["metadata"].get("deletionTimestamp"):
            continue
        finding = next(_of_pod(pod, startup_timeout_seconds), None)
        if finding is not None:
            found.append(finding)
    return sorted(found, key=lambda f: (_MOST_TELLING.index(f.reason), f.pod))


def _of_pod(pod: Mapping[str, Any], startup_timeout_seconds: int) -> Iterator[Finding]:
    name = pod["metadata"]["name"]
    statuses = [
        *pod["status"].get("initContainerStatuses", ()),
        *pod["status"].get("containerStatuses", ()),
    ]
    if not ready(pod):
        for status in statuses:
            yield from _crash(name, status, startup_timeout_seconds)
    for status in statuses:
        waiting = status.get("state", {}).get("waiting") or {}
        reason, message = waiting.get("reason", ""), waiting.get("message", "")
        if reason in _PULL_PROBLEMS:
            yield Finding(
                name, Reason.IMAGE_PULL_FAILED, f"Pod {name} cannot pull {status.get('image')}: {message or reason}"
            )
        elif reason in _CONFIG_PROBLEMS:
            missing = Reason.VOLUME_NOT_READY if "volume" in message.lower() else Reason.CONTAINER_CONFIG_ERROR
            yield Finding(name, missing, f"Pod {name}, container {status['name']}: {message or reason}")
    scheduled = pod_condition(pod, "PodScheduled")
    if scheduled.get("status") == "False":
        message = scheduled.get("message", "no node fits")
        claim = "persistentvolumeclaim" in message.lower()
        yield Finding(
            name, Reason.VOLUME_NOT_READY if claim else Reason.UNSCHEDULABLE, f"Pod {name} waits for a node: {message}"
        )
    if pod["status"].get("phase") == "Failed":
        why = pod["status"].get("message") or pod["status"].get("reason") or "no reason given"
        yield Finding(name, Reason.ENGINE_CRASHED, f"Pod {name} failed: {why}")
    if not ready(pod):
        yield Finding(name, Reason.STARTING, _starting(pod, name))


def _crash(pod: str, status: Mapping[str, Any], startup_timeout_seconds: int) -> Iterator[Finding]:
    ended = status.get("state", {}).get("terminated") or status.get("lastState", {}).get("terminated")
    if not ended:
        return
    restarts = status.get("restartCount", 0)
    lines = "\n".join(str(ended.get("message", "")).strip().splitlines()[-_LOG_LINES:])[-_LOG_CHARACTERS:]
    tail = f" Last log lines:\n{lines}" if lines else ""
    where = f"Pod {pod}, container {status['name']}"
    again = f" ({restarts} restarts)" if restarts else ""
    if ended.get("reason") == "OOMKilled":
        limit = "raise its memory limit in engine.resources, or lower engine.gpuMemoryPercent"
        yield Finding(pod, Reason.OUT_OF_MEMORY, f"{where} was killed for memory{again}; {limit}.{tail}")
        return
    if status["name"] != names.CONTAINER_ENGINE:
        yield Finding(pod, Reason.SIDECAR_CRASHED, f"{where} exited with code {ended.get('exitCode')}{again}.{tail}")
        return
    late = _seconds(ended) - startup_timeout_seconds
    if 0 <= late <= _STARTUP_KILL_SECONDS and ended.get("exitCode") in (137, 143):
        yield Finding(
            pod,
            Reason.STARTUP_TIMED_OUT,
            f"{where} did not answer within engine.startupTimeoutSeconds ({startup_timeout_seconds} s) and was ended{again}; "
            f"raise it, or cache the model.{tail}",
        )
        return
    yield Finding(pod, Reason.ENGINE_CRASHED, f"{where} exited with code {ended.get('exitCode')}{again}.{tail}")


def _starting(pod: Mapping[str, Any], name: str) -> str:
    if not pod["spec"].get("nodeName"):
        return f"Pod {name} is being scheduled."
    node = pod["spec"]["nodeName"]
    for status in pod["status"].get("containerStatuses", ()):
        if status["name"] == names.CONTAINER_ENGINE and "running" in status.get("state", {}):
            return f"Pod {name} on {node} loads the model."
    return f"Pod {name} on {node} pulls its images and volumes."


def pod_condition(pod: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """The condition of that type, empty where the pod has none."""
    conditions = pod["status"].get("conditions", ())
    return next((c for c in conditions if c["type"] == kind), {})


def _seconds(terminated: Mapping[str, Any]) -> float:
    """How long a container ran; 0 where the kubelet does not say."""
    try:
        started, ended = (datetime.fromisoformat(terminated[key]) for key in ("startedAt", "finishedAt"))
    except (KeyError, TypeError, ValueError):
        return 0.0
    return (ended - started).total_seconds()
