"""A field exists only when code reads it: changing each one changes what is written, or what is said.

The table must name every leaf field of the spec; a field that is added without an effect, or without a row here, fails.
"""

import copy
import json
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from kvplane_api import names
from kvplane_api.service import (
    CapacityStatus,
    GroupRestarts,
    LLMServiceSpec,
    LLMServiceStatus,
    PodExits,
    PoolStatus,
)
from kvplane_api.wire import SidecarConfig
from kvplane_operator.autoscaler import view
from kvplane_operator.autoscaler.settings import Tuning
from kvplane_operator.plan.record import DATA_KEY, RING_DATA_KEY
from kvplane_operator.plan.snapshot import Reading
from tests.kvplane_operator.ring_world import RingWorld, formed
from tests.kvplane_operator.world import CONFIG_MAP, HF, World, pod, settled, state

RING = {"mode": "Ring", "model": {"source": "pvc://models"}, "ring": {"size": 2}}
FACTS = {"layers": 32, "kvHeads": 8, "headDim": 128, "parameters": 8_000_000_000, "acceleratorMemory": "24Gi"}
LONG = {"maxTokens": 90_000}
NATIVE = {"autoscaling": {"policy": "Native", "maxReplicas": 8}}

# field -> (parts of the spec around it, one value, another value)
CHANGES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "model.source": ({}, "hf://acme/tiny", "pvc://models"),
    "model.servedName": ({}, "a", "b"),
    "model.tokenSecretRef.name": ({}, "a", "b"),
    "model.tokenSecretRef.key": ({"model": {"tokenSecretRef": {"name": "a"}}}, "token", "other"),
    "model.cache.claimName": ({}, "a", "b"),
    "model.cache.sizeLimit": ({}, "1Gi", "2Gi"),
    "model.facts.layers": ({"model": {"facts": FACTS}, "context": LONG}, 32, 1),
    "model.facts.kvHeads": ({"model": {"facts": FACTS}, "context": LONG}, 8, 1),
    "model.facts.headDim": ({"model": {"facts": FACTS}, "context": LONG}, 128, 16),
    "model.facts.parameters": ({"model": {"facts": FACTS}, "context": LONG}, 8_000_000_000, 1_000_000),
    "model.facts.acceleratorMemory": ({"model": {"facts": FACTS}, "context": LONG}, "24Gi", "80Gi"),
    "context.maxTokens": ({}, 1024, 2048),
    "context.ringThresholdTokens": ({"context": LONG}, 100_000, 50_000),
    "mode": ({"context": {"maxTokens": 200_000}}, "Auto", "Paged"),
    "replicas": ({}, 1, 2),
    "engine.image": ({}, "a", "b"),
    "engine.dtype": ({}, "auto", "float16"),
    "engine.kvCacheDtype": ({}, "auto", "fp8"),
    "engine.tensorParallelSize": ({}, 1, 2),
    "engine.resources.limits": ({}, {"cpu": 1}, {"cpu": 2}),
    "engine.resources.requests": ({}, {"cpu": 1}, {"cpu": 2}),
    "engine.env[].name": ({"engine": {"env": [{}]}}, "A", "B"),
    "engine.env[].value": ({"engine": {"env": [{"name": "A"}]}}, "1", "2"),
    "engine.env[].valueFrom": (
        {"engine": {"env": [{"name": "A"}]}},
        {"fieldRef": {"fieldPath": "metadata.name"}},
        {"fieldRef": {"fieldPath": "metadata.uid"}},
    ),
    "engine.extraArgs": ({}, [], ["--enforce-eager"]),
    "engine.blockSize": ({}, 16, 32),
    "engine.gpuMemoryPercent": ({}, 90, 80),
    "engine.startupTimeoutSeconds": ({}, 3600, 60),
    "engine.maxBatchedTokens": ({}, 1024, 2048),
    "engine.maxSequences": ({}, 1, 2),
    "engine.prefixCaching": ({}, "Enabled", "Disabled"),
    "engine.speculative.method": ({"engine": {"speculative": {"model": "a/b"}}}, "Draft", "Eagle3"),
    "engine.speculative.tokens": ({"engine": {"speculative": {"method": "Ngram"}}}, 4, 5),
    "engine.speculative.model": ({"engine": {"speculative": {"method": "Draft"}}}, "a/b", "a/c"),
    "engine.kvOffload.cpuMemory": ({}, "1Gi", "2Gi"),
    "engine.kvTransfer": ({}, {"kv_connector": "A"}, {"kv_connector": "B"}),
    "ring.size": (RING, 2, 3),
    "ring.windowTokens": (RING, 1024, 2048),
    "ring.image": (RING, "a", "b"),
    "ring.resources.limits": (RING, {"cpu": 1}, {"cpu": 2}),
    "ring.resources.requests": (RING, {"cpu": 1}, {"cpu": 2}),
    "ring.spread": (RING, "Preferred", "Required"),
    "ring.recovery.reformGraceSeconds": (RING, 30, 60),
    "ring.recovery.restartBudget": (RING, 0, 1),
    "ring.recovery.budgetWindowSeconds": ({**RING, "ring": {"size": 2, "recovery": {"restartBudget": 1}}}, 60, 3600),
    "ring.recovery.reserve": (RING, "None", "Survive"),
    "slo.ttftMilliseconds": ({}, 2000, 3000),
    "slo.tpotMilliseconds": ({}, 50, 40),
    "admission.policy": ({}, "Enforce", "Observe"),
    "admission.reservation": ({}, "Expected", "Worst"),
    "admission.kvHardCapPercent": ({}, 95, 90),
    "admission.kvPeakPercent": ({}, 100, 110),
    "admission.queue.maxRequests": ({}, 256, 0),
    "admission.queue.maxWaitSeconds": ({}, 1, 2),
    "admission.fairness.header": ({}, "x-tenant", "x-team"),
    "admission.fairness.tokensPerSecond": ({}, 100, 200),
    "admission.priorities": ({}, ["interactive", "batch"], ["batch", "interactive"]),
    "admission.maxBodyBytes": ({}, 1024, 2048),
    "autoscaling.policy": (NATIVE, "Native", "Off"),
    "autoscaling.minReplicas": (NATIVE, 1, 2),
    "autoscaling.maxReplicas": ({"autoscaling": {"policy": "Native"}}, 8, 9),
    "autoscaling.scaleToZeroAfterSeconds": (NATIVE, 600, 900),
    "autoscaling.scaleDownWindowSeconds": (NATIVE, 300, 60),
    "autoscaling.costOfMiss": (NATIVE, 4, 0),
    "rollout.maxSurge": ({}, 1, 2),
    "rollout.maxUnavailable": ({}, 0, 1),
    "disruption.pdb": ({"replicas": 2}, "Auto", "Off"),
    "disruption.drainSeconds": ({}, 600, 60),
    "podTemplate.metadata.labels": ({}, {"a": "b"}, {"a": "c"}),
    "podTemplate.metadata.annotations": ({}, {"a": "b"}, {"a": "c"}),
    "podTemplate.spec": ({}, {"priorityClassName": "a"}, {"priorityClassName": "b"}),
}


def leaves(model: type[BaseModel], path: str = "") -> Iterator[str]:
    """Paths of the fields that hold no further model."""
    for field in model.model_fields.values():
        here = f"{path}.{field.alias}" if path else str(field.alias)
        inner, many = _model(field.annotation)
        if inner is None:
            yield here
        else:
            yield from leaves(inner, f"{here}[]" if many else here)


def _model(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    found = [_model(argument) for argument in get_args(annotation)]
    inner = next((model for model, _ in found if model), None)
    return inner, getattr(annotation, "__origin__", None) is list or any(many for model, many in found if model)


def spec_with(around: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    spec = copy.deepcopy(around)
    node: Any = spec
    *parents, last = path.split(".")
    for parent in parents:
        node = node.setdefault(parent.removesuffix("[]"), {})
        node = node[0] if parent.endswith("[]") else node
    node[last] = value
    spec.setdefault("model", {}).setdefault("source", "hf://acme/tiny")
    return spec


def effect(spec: dict[str, Any]) -> str:
    """What the world sees of a spec: children without bookkeeping, conditions, and what the autoscaler's law is told.

    That the law heeds it is shown where the law is tested.
    """
    scaled = LLMServiceSpec.parse(spec).autoscaling
    law = str(view.settings(scaled, Tuning())) if scaled is not None else ""
    world: World = settled(spec) if spec.get("mode") != "Ring" else _crashing_ring(spec)
    children = copy.deepcopy(world.children)
    for child in children.values():
        child["metadata"] = {}
    for key in (DATA_KEY, RING_DATA_KEY):
        children.get(CONFIG_MAP, {"data": {}})["data"].pop(key, None)
    return json.dumps(
        [{str(ref): child for ref, child in children.items()}, world.status["conditions"], law], sort_keys=True
    )


def _crashing_ring(spec: dict[str, Any]) -> World:
    """One rank exits, comes back for longer than the shortest window, and exits again."""
    world = formed(spec)
    for _ in range(2):
        world.crash(0, 1)
        world.run(1)
        world.down.clear()
        world.run(8)
    world.down = {(0, 1)}
    return world.run(2)


def test_the_table_has_every_field() -> None:
    assert sorted(CHANGES) == sorted(leaves(LLMServiceSpec))


@pytest.mark.parametrize("path", sorted(CHANGES))
def test_changing_the_field_has_an_effect(path: str) -> None:
    around, one, other = CHANGES[path]
    assert effect(spec_with(around, path, one)) != effect(spec_with(around, path, other))


def test_the_sidecars_configuration_is_fed_from_the_spec_in_every_field() -> None:
    """What the sidecar may be told, the operator tells: with everything set, nothing is left at its default."""
    spec = {
        **HF,
        "disruption": {"drainSeconds": 1},
        "slo": {"ttftMilliseconds": 1, "tpotMilliseconds": 1},
        "admission": {
            "policy": "Observe",
            "reservation": "Worst",
            "kvHardCapPercent": 50,
            "kvPeakPercent": 85,
            "queue": {"maxRequests": 1, "maxWaitSeconds": 1},
            "fairness": {"header": "x-tenant", "tokensPerSecond": 1},
            "priorities": ["interactive"],
            "maxBodyBytes": 1024,
        },
        "engine": {
            "maxBatchedTokens": 1,
            "maxSequences": 1,
            "speculative": {"method": "Ngram", "tokens": 1},
        },
    }
    told = json.loads(settled(spec).children[CONFIG_MAP]["data"][names.FILE_SIDECAR_CONFIG])
    usual = SidecarConfig(served_name="?").model_dump(by_alias=True, mode="json")
    same = {path for path, value in _flat(told) if value == dict(_flat(usual)).get(path)}
    assert same == {"schemaVersion", "engine.prefixCaching"}  # on, as is usual, so that kvEvents can be


def _flat(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from _flat(value, here)
        else:
            yield here, value


def test_the_operator_writes_every_status_field() -> None:
    world = settled()
    world.counts(replicas=1, ready=1)
    world.pods, world.readings = [pod(ready=True)], {"chat-1": Reading(state())}
    status = world.plan().status
    of_ring = _every_ring_field()
    for model, written in (
        (LLMServiceStatus, set(status)),
        (PoolStatus, set(status["pools"][0]) | set(of_ring)),
        (GroupRestarts, set(of_ring["restarts"][0])),
        (PodExits, set(of_ring["restarts"][0]["pods"][0])),
        (CapacityStatus, set(status["capacity"])),
    ):
        assert written == {str(field.alias) for field in model.model_fields.values()}
    LLMServiceStatus.model_validate(status)
    PoolStatus.model_validate(of_ring)


def _every_ring_field() -> dict[str, Any]:
    """The pool of one ring that was given up, and one that is short of a rank."""
    world = RingWorld({**RING, "replicas": 2, "ring": {"size": 3}})
    world.annotations = {names.ANNOTATION_RETRY: "1"}
    world.run(4)
    world.crash(0, 0, times=6)
    world.run(10)
    world.crash(1, 1)
    world.run(2)
    return world.ring_pool()
