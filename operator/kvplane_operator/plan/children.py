"""The wanted children of a paged service, as complete manifests for server-side apply, and what all pools' children share."""

from collections.abc import Iterable, Mapping
from typing import Any

from kvplane_api import names
from kvplane_api.service import LLMServiceSpec
from kvplane_api.wire import AdmissionConfig, EngineConfig, FairnessConfig, QueueConfig, SidecarConfig, SloConfig
from kvplane_operator.plan import pods
from kvplane_operator.plan import record as records
from kvplane_operator.plan.pods import TEMPLATE_REVISION, Variant, common_labels, pod_template, selector
from kvplane_operator.plan.snapshot import Kind, Manifest, Ref, Snapshot
from kvplane_operator.settings import OperatorSettings

API_VERSION = {
    Kind.DEPLOYMENT: "apps/v1",
    Kind.STATEFUL_SET: "apps/v1",
    Kind.SERVICE: "v1",
    Kind.CONFIG_MAP: "v1",
    Kind.PDB: "policy/v1",
}

_PROGRESS_MARGIN_SECONDS = 600
"""Scheduling, pulling and draining on top of the engine's own start, before a rollout counts as stuck."""


def config_hash(config: str) -> str:
    """What the pods' annotation holds: changes exactly when the sidecar's configuration does."""
    return records.digest(config)


def sidecar_config(spec: LLMServiceSpec, service: str, *, kv_events: bool) -> str:
    """The sidecar's configuration file; ``kv_events``: whether the engines of the service's pods publish theirs."""
    slo, admission, engine = spec.slo, spec.admission, spec.engine
    config = SidecarConfig(
        served_name=spec.served_name(service),
        drain_seconds=spec.disruption.drain_seconds,
        max_body_bytes=admission.max_body_bytes,
        slo=SloConfig(
            ttft_milliseconds=slo.ttft_milliseconds,
            tpot_milliseconds=slo.tpot_milliseconds,
        ),
        admission=AdmissionConfig(
            policy=admission.policy,
            reservation=admission.reservation,
            kv_hard_cap_percent=admission.kv_hard_cap_percent,
            kv_peak_percent=admission.kv_peak_percent,
            queue=QueueConfig(
                max_requests=admission.queue.max_requests, max_wait_seconds=admission.queue.max_wait_seconds
            ),
            fairness=FairnessConfig(
                header=admission.fairness.header, tokens_per_second=admission.fairness.tokens_per_second
            ),
            priorities=tuple(admission.priorities or ()),
        ),
        engine=EngineConfig(
            max_batched_tokens=engine.max_batched_tokens,
            max_sequences=engine.max_sequences,
            speculative_tokens=engine.speculative.tokens if engine.speculative else 0,
            prefix_caching=engine.prefix_caching == "Enabled",
            kv_events=kv_events,
        ),
    )
    return config.model_dump_json(by_alias=True, indent=2) + "\n"


def current_record(
    snapshot: Snapshot, spec: LLMServiceSpec, settings: OperatorSettings, variant: Variant, *, ring: int | None = None
) -> records.Record:
    """The pod template to use: the recorded one while what it depends on is unchanged, else a newly rendered one.

    ``ring`` is the size of the service's rings; None where it has none.
    """
    extra = (
        {
            "revision": TEMPLATE_REVISION,
            "sidecar": settings.sidecar_image,
            "engine": settings.engine_image if ring is None else settings.ring_image,
            "accelerator": settings.accelerator,
            "pull": settings.image_pull_policy,
        }
        if settings.rollout_on_upgrade
        else None
    )
    key = records.template_key(spec, service=snapshot.name, ring=ring, extra=extra)
    kept = records.load(_recorded(snapshot), records.DATA_KEY if ring is None else records.RING_DATA_KEY)
    if kept is not None and kept.key == key:
        return kept
    config = sidecar_config(spec, snapshot.name, kv_events=variant.kv_events)
    template = pod_template(
        spec, service=snapshot.name, settings=settings, config_hash=config_hash(config), variant=variant
    )
    return records.make(key, template)


def current_config(snapshot: Snapshot, spec: LLMServiceSpec, *, record: records.Record) -> str:
    """The sidecar's configuration for the pods of ``record``, which an earlier version may have rendered."""
    return sidecar_config(spec, snapshot.name, kv_events=pods.publishes_kv_events(record.template))


def wanted_children(
    snapshot: Snapshot, spec: LLMServiceSpec, *, record: records.Record, config: str, clients: Mapping[str, str]
) -> dict[Ref, Manifest]:
    """All children that should exist, by kind and name; whatever else is owned by the service should not.

    ``clients``: labels of the pods that clients are led to.
    """
    name, labels = snapshot.name, selector(snapshot.name)
    children = [
        config_map(snapshot, config, record, ring=False),
        _deployment(name, spec, record),
        service(name, clients),
        # Headless: one DNS name and one address per pod, for what chooses pods itself.
        service(f"{name}-pods", clients, clusterIP="None"),
    ]
    if spec.disruption.pdb == "Auto" and spec.replicas > 1:
        # A pod that does not serve must never block a drain.
        children.append(disruption_budget(name, labels, unhealthy="AlwaysAllow"))
    return finished(children, snapshot)


def finished(children: Iterable[Manifest], snapshot: Snapshot) -> dict[Ref, Manifest]:
    """The children as they are applied: namespace, labels, owner, and the hash that tells a change of the plan."""
    return {Ref(Kind(child["kind"]), child["metadata"]["name"]): _finish(child, snapshot) for child in children}


def _finish(child: Manifest, snapshot: Snapshot) -> Manifest:
    metadata = child["metadata"]
    metadata["namespace"] = snapshot.namespace
    metadata["labels"] = {
        **metadata.get("labels", {}),
        names.LABEL_SERVICE: snapshot.name,
        **common_labels(snapshot.name),
    }
    metadata["ownerReferences"] = [
        {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "name": snapshot.name,
            "uid": snapshot.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }
    ]
    metadata["annotations"] = {names.ANNOTATION_PLAN_HASH: records.digest(child)}
    return child


def manifest(kind: Kind, name: str, **body: Any) -> Manifest:
    """A child without what ``finished`` adds."""
    return {"apiVersion": API_VERSION[kind], "kind": kind.value, "metadata": {"name": name}, **body}


def config_map(snapshot: Snapshot, config: str, record: records.Record, *, ring: bool) -> Manifest:
    """The sidecar's configuration, and beside it the recorded template; that of the other mode's pods too, as long as there are
    any, since a change of mode may be taken back."""
    mine, other, makes_others = (
        (records.RING_DATA_KEY, records.DATA_KEY, Kind.DEPLOYMENT)
        if ring
        else (records.DATA_KEY, records.RING_DATA_KEY, Kind.STATEFUL_SET)
    )
    data = {names.FILE_SIDECAR_CONFIG: config, mine: record.text}
    recorded = _recorded(snapshot)
    if other in recorded and any(ref.kind is makes_others for ref in snapshot.children):
        data[other] = recorded[other]
    return manifest(Kind.CONFIG_MAP, snapshot.name, data=data)


def _recorded(snapshot: Snapshot) -> Mapping[str, str]:
    held = snapshot.children.get(Ref(Kind.CONFIG_MAP, snapshot.name), {})
    data: Mapping[str, str] = held.get("data") or {}
    return data


def _deployment(name: str, spec: LLMServiceSpec, record: records.Record) -> Manifest:
    return manifest(
        Kind.DEPLOYMENT,
        name,
        spec={
            "replicas": spec.replicas,
            "selector": {"matchLabels": selector(name)},
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {
                    "maxSurge": spec.rollout.max_surge,
                    "maxUnavailable": spec.rollout.max_unavailable,
                },
            },
            "revisionHistoryLimit": 3,
            "progressDeadlineSeconds": spec.engine.startup_timeout_seconds + _PROGRESS_MARGIN_SECONDS,
            "template": record.template,
        },
    )


def service(name: str, selects: Mapping[str, str], **more: Any) -> Manifest:
    """A Service that leads clients to the sidecars of the pods with these labels."""
    return manifest(
        Kind.SERVICE,
        name,
        spec={
            **more,
            "type": "ClusterIP",
            "selector": dict(selects),
            "ports": [
                {"name": "http", "port": names.PORT_SERVING, "protocol": "TCP", "targetPort": names.PORT_SERVING}
            ],
        },
    )


def disruption_budget(name: str, selects: Mapping[str, str], *, unhealthy: str) -> Manifest:
    """One of the pods with these labels may be evicted at a time; ``unhealthy``: the policy for those that are not Ready."""
    return manifest(
        Kind.PDB,
        name,
        spec={
            "maxUnavailable": 1,
            "selector": {"matchLabels": dict(selects)},
            "unhealthyPodEvictionPolicy": unhealthy,
        },
    )
