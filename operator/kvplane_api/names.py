"""Names that several components spell: API group, labels, annotations, ports, containers, environment, paths.

A label or an annotation is listed only when code reads or writes it. Ports are fixed, not configurable: the Services,
the probes, the sidecar and the dashboards all count on them.
"""

import re
from typing import Final

GROUP: Final = "kvplane.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
KIND: Final = "LLMService"
PLURAL: Final = "llmservices"
SINGULAR: Final = "llmservice"
SHORT_NAMES: Final = ("llms",)
CATEGORY: Final = "kvplane"

MANAGER: Final = "kvplane-operator"
"""Field manager of every server-side apply, and the value of ``app.kubernetes.io/managed-by``."""

# Labels on every child and on its pods.
LABEL_SERVICE: Final = f"{GROUP}/service"
"""Name of the LLMService that owns the object; selector of its pods."""
LABEL_POOL: Final = f"{GROUP}/pool"
"""Which pool of the service the pod belongs to."""
POOL_PAGED: Final = "paged"
POOL_RING: Final = "ring"
LABEL_GROUP: Final = f"{GROUP}/group"
"""Number of the ring group that the object belongs to: an identity, so that groups may have holes between them."""
LABEL_POD_INDEX: Final = "apps.kubernetes.io/pod-index"
"""Ordinal of a StatefulSet's pod, written by its controller (Kubernetes 1.28 or later): the rank of a ring."""
LABEL_APP_NAME: Final = "app.kubernetes.io/name"
LABEL_APP_INSTANCE: Final = "app.kubernetes.io/instance"
LABEL_APP_COMPONENT: Final = "app.kubernetes.io/component"
LABEL_APP_PART_OF: Final = "app.kubernetes.io/part-of"
LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"

# Annotations on children.
ANNOTATION_PLAN_HASH: Final = f"{GROUP}/plan-hash"
"""Hash of the child as the operator last wanted it; a different wanted hash means the plan changed."""
ANNOTATION_CONFIG_HASH: Final = f"{GROUP}/config-hash"
"""On a pod: hash of the sidecar configuration; changed so that the kubelet syncs the ConfigMap volume at once."""
ANNOTATION_TEMPLATE_HASH: Final = f"{GROUP}/template-hash"
"""On the pods of a ring: hash of the template that they were made from; one that is not its set's is to be renewed."""
ANNOTATION_DRAIN_SINCE: Final = f"{GROUP}/drain-since"
"""On rank 0 of a ring: since when the operator drains the group. It stays until the pod goes, whoever leads."""

ANNOTATION_DELETION_COST: Final = "controller.kubernetes.io/pod-deletion-cost"
"""On a pod of a Deployment: those with the lowest go first when it is scaled down. Kubernetes reads it, without it 0."""

# Annotations on an LLMService, written by users.
ANNOTATION_RETRY: Final = f"{GROUP}/retry"
"""A new value gives ring groups that used up their restart budget another one."""
ANNOTATION_WAKE: Final = f"{GROUP}/wake"
"""A new value says that somebody asks for a service that was scaled to zero: it is brought back at once."""

# Ports (TCP).
PORT_SERVING: Final = 8000
"""Sidecar and Services: the OpenAI-compatible API."""
PORT_ADMIN: Final = 8001
"""Sidecar admin: ``/healthz /ready /engine/startup /engine/live /drain /state /metrics``. Never on the client port."""
PORT_ENGINE: Final = 8100
"""The engine, on 127.0.0.1 only: nothing goes round the sidecar."""
PORT_RING_STORE: Final = 29500
"""Rendezvous of a ring, on rank 0: the store through which ranks learn each other's sockets."""
PORT_RING_CONTROL: Final = 29501
"""Control connections of a ring's workers to rank 0."""
PORT_OPERATOR_HEALTH: Final = 8080
PORT_OPERATOR_METRICS: Final = 9090

# Containers and paths inside an engine pod.
CONTAINER_SIDECAR: Final = "kvplane-sidecar"
CONTAINER_ENGINE: Final = "engine"
PATH_MODEL: Final = "/models"
"""Where ``pvc://``, ``oci://`` and ``path://`` sources are mounted, read-only."""
PATH_MODEL_CACHE: Final = "/var/cache/kvplane/models"
"""Where ``hf://`` sources are downloaded (``HF_HOME``)."""
PATH_SIDECAR_CONFIG: Final = "/etc/kvplane/sidecar"
FILE_SIDECAR_CONFIG: Final = "sidecar.json"

PATH_KV_EVENTS: Final = "/run/kvplane"
"""An emptyDir that engine and sidecar share, for the sockets of the engine's KV events: never a port."""
KV_EVENTS_ENDPOINT: Final = f"ipc://{PATH_KV_EVENTS}/kv-events.sock"
KV_REPLAY_ENDPOINT: Final = f"ipc://{PATH_KV_EVENTS}/kv-replay.sock"

# Environment of the sidecar.
ENV_CONFIG_FILE: Final = "KVPLANE_CONFIG_FILE"
ENV_POD_NAME: Final = "KVPLANE_POD_NAME"
ENV_POD_NAMESPACE: Final = "KVPLANE_POD_NAMESPACE"
ENV_SERVICE: Final = "KVPLANE_SERVICE"
ENV_POOL: Final = "KVPLANE_POOL"
"""Which pool the pod belongs to, as in its label; unset: paged. No part of the configuration file, which pods of both pools
share while a service changes its mode."""

# Timing that both sides must agree on (seconds).
DRAIN_GRACE_SECONDS: Final = 5
"""After ``/drain`` new requests are still served until none has come for this long: endpoints and clients learn late."""
TERMINATION_MARGIN_SECONDS: Final = 15
"""Between the end of a drain and the kill: terminationGracePeriodSeconds = 5 + drainSeconds + 15."""

# Names inside a ring.
STRATEGY_RING: Final = "RING"
"""Value of ``PROMPT_SPLIT_STRATEGY``, the only one that the ring engine takes."""
_RANK: Final = re.compile(r"(?P<set>.+)-(?P<ordinal>0|[1-9][0-9]{0,3})")


def rank_of(host: str) -> tuple[str, int] | None:
    """The StatefulSet of the pod with that host name, and its ordinal, which is its rank; None: it is no pod of a set."""
    found = _RANK.fullmatch(host)
    return (found["set"], int(found["ordinal"])) if found else None


def rank_0_of(stateful_set: str) -> str:
    """The address of rank 0: pod 0 of the set, in the headless Service that bears the set's name."""
    return f"{stateful_set}-0.{stateful_set}"
