"""The pods of ring groups: the ring engine behind the same sidecar as every engine, one rank each.

The engine's words are those of its settings (kvplane_runtime.ring.settings). It learns its rank and rank 0's address from
the names that a StatefulSet and its headless Service give, and reads the sidecar's configuration file beside the sidecar. One
template serves all groups; ``for_group`` makes it a
group's own, so that ranks of one ring, not of one service, are spread over nodes.
"""

import copy
from typing import Any

from kvplane_api import names
from kvplane_api.service import LLMServiceSpec
from kvplane_operator.plan import record as records
from kvplane_operator.plan import sources
from kvplane_operator.plan.engine_args import SHUTDOWN_SECONDS
from kvplane_operator.plan.pods import CONFIG_FILE, CONFIG_MOUNT, Variant, env, resources, spread_over_nodes
from kvplane_operator.plan.ring.size import asked
from kvplane_operator.settings import OperatorSettings

COMMAND = ("kvplane-ring", "serve")

_RESERVE = {"None": "Off", "Survive": "Survive"}
_LOST_NODE = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")


def selector(service: str) -> dict[str, str]:
    """Labels that select the ring pods of a service, all ranks of all groups."""
    return {names.LABEL_SERVICE: service, names.LABEL_POOL: names.POOL_RING}


def serving_selector(service: str) -> dict[str, str]:
    """Labels that select the pods that clients are led to: each group's rank 0, which is Ready while its ring is formed."""
    return {**selector(service), names.LABEL_POD_INDEX: "0"}


def group_selector(service: str, number: int) -> dict[str, str]:
    """Labels that select the ranks of one group; immutable in a StatefulSet."""
    return {**selector(service), names.LABEL_GROUP: str(number)}


def variant(spec: LLMServiceSpec, *, service: str, size: int, settings: OperatorSettings) -> Variant:
    """The pods of rings of ``size`` ranks."""
    ring = asked(spec)
    given = resources(ring.resources or spec.engine.resources, accelerator=settings.accelerator, accelerators=1)
    device = "cpu" if given.get("limits", {}).get(settings.accelerator, "0") == "0" else "cuda"
    return Variant(
        selector=selector(service),
        image=ring.image or settings.ring_image,
        command=COMMAND[:1],
        args=list(COMMAND[1:]),
        resources=given,
        env=tuple(_env(spec, service=service, size=size, device=device)),
        mounts=(CONFIG_MOUNT,),
        sidecar_env=(env(names.ENV_POOL, names.POOL_RING),),
        placement={**_spread(ring.spread, service), "tolerations": _tolerations(ring.recovery.reform_grace_seconds)},
    )


def template_hash(template: dict[str, Any]) -> str:
    """What tells the pods of one template from those of another; how their sidecars are configured does not."""
    metadata = template["metadata"]
    annotations = {k: v for k, v in metadata["annotations"].items() if k != names.ANNOTATION_CONFIG_HASH}
    return records.digest({**template, "metadata": {**metadata, "annotations": annotations}})


def for_group(template: dict[str, Any], number: int, *, service: str) -> dict[str, Any]:
    """The template of one group: its label, in the pods and where its ranks keep away from each other, and the hash."""
    mine = copy.deepcopy(template)
    mine["metadata"]["labels"][names.LABEL_GROUP] = str(number)
    mine["metadata"]["annotations"][names.ANNOTATION_TEMPLATE_HASH] = template_hash(template)
    # Any of them may be null by podTemplate, which takes it away.
    affinity = (mine["spec"].get("affinity") or {}).get("podAntiAffinity") or {}
    apart = (
        *(mine["spec"].get("topologySpreadConstraints") or ()),
        *(affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or ()),
    )
    for rule in apart:
        if rule.get("labelSelector") == {"matchLabels": selector(service)}:
            rule["labelSelector"] = {"matchLabels": group_selector(service, number)}
    return mine


def _env(spec: LLMServiceSpec, *, service: str, size: int, device: str) -> list[dict[str, Any]]:
    ring = asked(spec)
    values = {
        "WORLD_SIZE": str(size),
        "PROMPT_SPLIT_STRATEGY": names.STRATEGY_RING,
        "KVPLANE_RING_DEVICE": device,
        "KVPLANE_RING_MODEL": sources.render(spec.model).args[0],
        "KVPLANE_RING_SERVED_NAME": spec.served_name(service),
        "KVPLANE_RING_DTYPE": spec.engine.dtype,
        "KVPLANE_RING_RESERVE": _RESERVE[ring.recovery.reserve],
        # The sidecar has drained before the engine is told to stop; this is the second net, as of every engine.
        "KVPLANE_RING_DRAIN_SECONDS": str(SHUTDOWN_SECONDS),
        # The promised time to the first token, which may change without a restart.
        "KVPLANE_RING_CONFIG_FILE": CONFIG_FILE,
    }
    if spec.context.max_tokens is not None:
        values["KVPLANE_RING_CONTEXT_TOKENS"] = str(spec.context.max_tokens)
    if ring.window_tokens is not None:
        values["KVPLANE_RING_WINDOW_TOKENS"] = str(ring.window_tokens)
    if spec.engine.max_sequences is not None:
        values["KVPLANE_RING_MAX_SEQUENCES"] = str(spec.engine.max_sequences)
    return [
        *(env(name, value) for name, value in values.items()),
        env("POD_IP", None, {"fieldRef": {"fieldPath": "status.podIP"}}),
        env("POD_UID", None, {"fieldRef": {"fieldPath": "metadata.uid"}}),
    ]


def _spread(spread: str, service: str) -> dict[str, Any]:
    if spread == "Preferred":
        return {"topologySpreadConstraints": [spread_over_nodes(selector(service))]}
    # A spread constraint would put a second rank on a node once every node has one; this never does.
    apart = {"labelSelector": {"matchLabels": selector(service)}, "topologyKey": "kubernetes.io/hostname"}
    return {"affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}}}


def _tolerations(seconds: int) -> list[dict[str, Any]]:
    """Kubernetes would wait 300 s. The ring works without the rank meanwhile; the wait is for a node that comes back."""
    return [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": seconds} for key in _LOST_NODE
    ]
