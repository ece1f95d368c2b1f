"""Settings of the operator, from the environment (``KVPLANE_OPERATOR_*``), as the chart writes them.

Each setting says what it means, its unit, how to switch it off, and why the default is what it is.
"""

import os
import socket
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from kvplane_api import names


class OperatorSettings(BaseSettings):
    """Everything an installation decides; a service decides the rest in its spec."""

    model_config = SettingsConfigDict(env_prefix="KVPLANE_OPERATOR_", frozen=True, extra="ignore")

    watch_namespaces: Annotated[tuple[str, ...], NoDecode] = ()
    """Namespaces to watch, comma-separated. Empty: all, which needs the ClusterRole."""

    lease_namespace: str = "kvplane-system"
    """Where the leader Lease lives: the operator's own namespace."""
    lease_name: str = "kvplane-operator"
    identity: str = Field(default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}")
    """Holder of the Lease; the pod's name in a cluster."""
    lease_seconds: int = Field(default=12, ge=4)
    """A Lease that was not renewed for so long is free: a standby that looks every renew_seconds then takes over within
    12 + 2.5 s."""
    renew_seconds: float = Field(default=2.5, gt=0)
    """Renewal period; one renewal is one API request, so 2.5 s costs 0.4 requests/s."""
    renew_deadline_seconds: float = Field(default=6.0, gt=0)
    """Without a successful renewal for so long the leader stops writing."""

    sidecar_image: str = "kvplane/control:dev"
    engine_image: str = "vllm/vllm-openai:v0.32.0"
    """Image of engines whose spec names none."""
    ring_image: str = ""
    """Image of ring engines whose spec names none. Empty: a ring has to name its own, since nobody else builds one."""
    image_pull_policy: str = "IfNotPresent"
    accelerator: str = "nvidia.com/gpu"
    """Extended resource that engines ask for, tensorParallelSize of it. Empty: CPU engines, nothing is asked for."""
    allow_path_sources: bool = False
    """Accept path:// models (hostPath). Off: a hostPath reads any directory of a node."""
    read_nodes: bool = False
    """Watch nodes, so that a pod on a node that is gone is deleted by force. Off: rings wait for the node, or for a person:
    the right to read nodes is the cluster's to give."""
    read_autoscalers: bool = True
    """List HorizontalPodAutoscalers twice a minute, so that one that fights for the replicas of a service is named in its
    condition. Off: nobody looks."""
    rollout_on_upgrade: bool = False
    """Let an upgrade of the operator roll pods to its images and template. Off: pods change only with their spec."""

    workers: int = Field(default=16, ge=1)
    """Services reconciled at the same time; more only queues inside the API server."""
    resync_seconds: float = Field(default=60.0, ge=1)
    """Slow safety net: each service is planned again after so long, from the cache, without API requests."""
    signals_seconds: float = Field(default=10.0, ge=1)
    """Period in which the state of each serving pod is read from its sidecar, where spec.autoscaling does not ask for more."""
    request_timeout_seconds: float = Field(default=5.0, gt=0)
    """Limit of one API request: shorter than lease_seconds - renew_deadline_seconds, so that a write that was sent in
    time has ended before another leader begins."""

    health_port: int = names.PORT_OPERATOR_HEALTH
    metrics_port: int = names.PORT_OPERATOR_METRICS
    bind_address: str = "0.0.0.0"  # noqa: S104  the kubelet and Prometheus come from other addresses
    log_level: str = "INFO"

    @field_validator("watch_namespaces", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value
