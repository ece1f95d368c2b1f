"""The pod template of every pool: the sidecar as a native sidecar container, the engine behind it.

What pools differ in is a ``Variant``: that of paged replicas is made here, that of rings in ``ring.pods``. Invariants that
the tests hold on to: the engine listens on loopback only; the drain is driven by the engine's preStop, which asks the
sidecar; both of the engine's probes go through the sidecar and have a short grace of their own, since a probe's kill runs
preStop too; nothing learned enters the template; the pod passes pod security ``restricted``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvplane_api import names
from kvplane_api.service import LLMServiceSpec, ResourceRequirements
from kvplane_operator.plan import engine_args, merge, sources
from kvplane_operator.settings import OperatorSettings

TEMPLATE_REVISION = 2
"""Raised when this module renders something else for the same spec. Running services keep the revision they have until
their spec changes (or the installation asks for rolloutOnUpgrade)."""

USER = 65532
"""Numeric user and group of every container, so that pod security can check that it is not root."""

VOLUME_SIDECAR_CONFIG = "sidecar-config"
CONFIG_MOUNT = {"name": VOLUME_SIDECAR_CONFIG, "mountPath": names.PATH_SIDECAR_CONFIG, "readOnly": True}
"""A whole volume, never a file of it: only so does the kubelet bring changes to running pods."""
CONFIG_FILE = f"{names.PATH_SIDECAR_CONFIG}/{names.FILE_SIDECAR_CONFIG}"

_SCRATCH = "/var/cache/kvplane"
_PROBE_GRACE_SECONDS = 10
_STARTUP_PERIOD_SECONDS = 5

_RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


@dataclass(frozen=True)
class Variant:
    """What the pods of one pool have of their own."""

    selector: Mapping[str, str]
    """Labels that select the pool's pods."""
    image: str
    command: tuple[str, ...]
    args: list[str]
    resources: Mapping[str, Any]
    """Of the engine; empty: nothing is asked for."""
    env: tuple[Mapping[str, Any], ...] = ()
    """Of the engine, after all other: the user's variables of these names do not count."""
    mounts: tuple[Mapping[str, Any], ...] = ()
    """Of the engine, after all other."""
    sidecar_env: tuple[Mapping[str, Any], ...] = ()
    placement: Mapping[str, Any] = field(default_factory=dict)
    """Parts of the pod spec that say where it may run."""
    kv_events: bool = False


def paged(spec: LLMServiceSpec, *, service: str, settings: OperatorSettings) -> Variant:
    """The pods of the paged pool."""
    engine = spec.engine
    return Variant(
        selector=selector(service),
        image=engine.image or settings.engine_image,
        command=engine_args.COMMAND,
        args=engine_args.engine_args(spec, served_name=spec.served_name(service)),
        resources=resources(
            engine.resources, accelerator=settings.accelerator, accelerators=engine.tensor_parallel_size
        ),
        placement={"topologySpreadConstraints": [spread_over_nodes(selector(service))]},
        kv_events=engine_args.publishes_kv_events(engine),
    )


def pod_template(
    spec: LLMServiceSpec, *, service: str, settings: OperatorSettings, config_hash: str, variant: Variant
) -> dict[str, Any]:
    """The pod template of the pool that ``variant`` describes, overlay included."""
    labels = {**variant.selector, **common_labels(service)}
    overlay = spec.pod_template
    metadata = overlay.metadata if overlay else None
    template: dict[str, Any] = {
        "metadata": {
            "labels": {**((metadata and metadata.labels) or {}), **labels},
            "annotations": {
                "kubectl.kubernetes.io/default-container": names.CONTAINER_ENGINE,
                **((metadata and metadata.annotations) or {}),
                names.ANNOTATION_CONFIG_HASH: config_hash,
            },
        },
        "spec": _pod_spec(spec, variant, service=service, settings=settings),
    }
    if overlay and overlay.spec:
        template["spec"] = merge.overlay(template["spec"], overlay.spec)
    return template


def publishes_kv_events(template: Mapping[str, Any]) -> bool:
    """Whether the engine of a template, which may be one that an earlier version rendered, publishes its KV events."""
    engine = next(c for c in template["spec"]["containers"] if c["name"] == names.CONTAINER_ENGINE)
    return engine_args.KV_EVENTS_FLAG in engine["args"]


def selector(service: str) -> dict[str, str]:
    """Labels that select the pods of the paged pool; immutable in a Deployment."""
    return {names.LABEL_SERVICE: service, names.LABEL_POOL: names.POOL_PAGED}


def common_labels(service: str) -> dict[str, str]:
    """The labels that Kubernetes recommends."""
    return {
        names.LABEL_APP_NAME: "kvplane-engine",
        names.LABEL_APP_INSTANCE: service,
        names.LABEL_APP_COMPONENT: "engine",
        names.LABEL_APP_PART_OF: "kvplane",
        names.LABEL_MANAGED_BY: names.MANAGER,
    }


def spread_over_nodes(labels: Mapping[str, str]) -> dict[str, Any]:
    """Pods with these labels go to different nodes, as long as there are some."""
    return {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": dict(labels)},
    }


def env(name: str, value: str | None, value_from: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An environment variable of a container."""
    return {"name": name, "valueFrom": dict(value_from)} if value_from else {"name": name, "value": value or ""}


def resources(given: ResourceRequirements | None, *, accelerator: str, accelerators: int) -> dict[str, Any]:
    """Requests and limits of an engine: what the user gave, and the installation's accelerator where it is not named."""
    limits = {k: str(v) for k, v in ((given and given.limits) or {}).items()}
    requests = {k: str(v) for k, v in ((given and given.requests) or {}).items()}
    if accelerator and accelerator not in limits:
        limits[accelerator] = str(accelerators)
    return {name: values for name, values in (("limits", limits), ("requests", requests)) if values}


def _pod_spec(spec: LLMServiceSpec, variant: Variant, *, service: str, settings: OperatorSettings) -> dict[str, Any]:
    source = sources.render(spec.model)
    drain = spec.disruption.drain_seconds
    kv_events = variant.kv_events
    return {
        "terminationGracePeriodSeconds": names.DRAIN_GRACE_SECONDS + drain + names.TERMINATION_MARGIN_SECONDS,
        # For the sidecar to end an engine that loads, and for an engine to hear signals that it has no handler for (0010).
        "shareProcessNamespace": True,
        # Neither container talks to the Kubernetes API.
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            # Without it the kubelet walks a model cache of many gigabytes at every start.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **variant.placement,
        "initContainers": [_sidecar(service, variant, settings=settings)],
        "containers": [_engine(spec, source, variant, settings=settings)],
        "volumes": [
            # Only the sidecar's key: the template recorded beside it is the operator's own.
            {
                "name": VOLUME_SIDECAR_CONFIG,
                "configMap": {
                    "name": service,
                    "items": [{"key": names.FILE_SIDECAR_CONFIG, "path": names.FILE_SIDECAR_CONFIG}],
                },
            },
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "scratch", "emptyDir": {}},
            *([{"name": "kv-events", "emptyDir": {}}] if kv_events else ()),
            *source.volumes,
        ],
    }


def _sidecar(service: str, variant: Variant, *, settings: OperatorSettings) -> dict[str, Any]:
    kv_events = variant.kv_events
    return {
        "name": names.CONTAINER_SIDECAR,
        "image": settings.sidecar_image,
        "imagePullPolicy": settings.image_pull_policy,
        "restartPolicy": "Always",
        "command": ["kvplane-sidecar"],
        "env": [
            {"name": names.ENV_CONFIG_FILE, "value": CONFIG_FILE},
            {"name": names.ENV_SERVICE, "value": service},
            {"name": names.ENV_POD_NAME, "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": names.ENV_POD_NAMESPACE, "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
            *map(dict, variant.sidecar_env),
        ],
        "ports": [
            {"name": "http", "containerPort": names.PORT_SERVING, "protocol": "TCP"},
            {"name": "admin", "containerPort": names.PORT_ADMIN, "protocol": "TCP"},
        ],
        # Bodies held (256 MiB), the reader of large ones (512 MiB), the ledger of KV blocks (200 MB), and the rest.
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "1536Mi"}},
        # Never waits for the engine: the engine starts only after it.
        "startupProbe": _probe("/healthz", period=1, timeout=2, failures=60),
        # Patient with a busy node: a lone replica that loses its endpoint for a slow answer loses all its requests.
        "readinessProbe": _probe("/ready", period=2, timeout=5, failures=2),
        "livenessProbe": _probe("/healthz", period=10, timeout=5, failures=3),
        "securityContext": _RESTRICTED,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            dict(CONFIG_MOUNT),
            {"name": "tmp", "mountPath": "/tmp", "subPath": "sidecar"},  # noqa: S108
            *([{"name": "kv-events", "mountPath": names.PATH_KV_EVENTS, "readOnly": True}] if kv_events else ()),
        ],
    }


def _engine(
    spec: LLMServiceSpec, source: sources.RenderedSource, variant: Variant, *, settings: OperatorSettings
) -> dict[str, Any]:
    engine = spec.engine
    startup_failures = -(-engine.startup_timeout_seconds // _STARTUP_PERIOD_SECONDS)
    container: dict[str, Any] = {
        "name": names.CONTAINER_ENGINE,
        "image": variant.image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": list(variant.command),
        "args": variant.args,
        "env": _by_name(
            [
                *_engine_env(),
                *source.env,
                *(env(e.name, e.value, e.value_from) for e in engine.env or ()),
                *map(dict, variant.env),
            ]
        ),
        "startupProbe": _probe(
            "/engine/startup",
            period=_STARTUP_PERIOD_SECONDS,
            timeout=3,
            failures=startup_failures,
            grace=_PROBE_GRACE_SECONDS,
        ),
        # Six failures 10 s apart outlast a restart of the sidecar, which answers for the engine.
        "livenessProbe": _probe("/engine/live", period=10, timeout=5, failures=6, grace=_PROBE_GRACE_SECONDS),
        "lifecycle": {"preStop": {"httpGet": {"path": "/drain", "port": names.PORT_ADMIN, "scheme": "HTTP"}}},
        "securityContext": _RESTRICTED,
        # The last log lines reach the pod's status, so the operator needs no right to read logs.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
            {"name": "tmp", "mountPath": "/tmp", "subPath": "engine"},  # noqa: S108
            {"name": "scratch", "mountPath": _SCRATCH},
            *([{"name": "kv-events", "mountPath": names.PATH_KV_EVENTS}] if variant.kv_events else ()),
            *source.mounts,
            *map(dict, variant.mounts),
        ],
    }
    if variant.resources:
        container["resources"] = dict(variant.resources)
    return container


def _engine_env() -> list[dict[str, Any]]:
    values = {
        # The root file system is read-only and the user has no home: everything the engine caches goes to an emptyDir.
        "HOME": _SCRATCH,
        "XDG_CACHE_HOME": f"{_SCRATCH}/.cache",
        "HF_HOME": names.PATH_MODEL_CACHE,
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return [env(name, value) for name, value in values.items()]


def _by_name(variables: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last of each name, at the place of the first: the API server refuses a name that stands twice."""
    return list({variable["name"]: variable for variable in variables}.values())


def _probe(path: str, *, period: int, timeout: int, failures: int, grace: int | None = None) -> dict[str, Any]:
    probe: dict[str, Any] = {
        "httpGet": {"path": path, "port": names.PORT_ADMIN, "scheme": "HTTP"},
        "periodSeconds": period,
        "timeoutSeconds": timeout,
        "failureThreshold": failures,
    }
    if grace is not None:
        probe["terminationGracePeriodSeconds"] = grace
    return probe
