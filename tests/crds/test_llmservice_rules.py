"""What the API server says to an LLMService: one valid base, one mutation per case, the text of the refusal asserted.

Everything is asked with ``dryRun=All`` and ``fieldValidation=Strict``, which is what ``kubectl apply`` sends.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from e2e.cluster.controlplane import ControlPlane
from e2e.cluster.errors import ApiError
from kvplane_api.service import (
    OWNED_CONTAINER_FIELDS,
    OWNED_ENGINE_FLAGS,
    PAGED_ENGINE_FIELDS,
    RESERVED_ENV,
    RING_ENV,
)

Service = dict[str, Any]
Ask = Callable[[Service], str]

HF = "hf://acme/tiny"
HUGE = 10**9
FACTS = {"layers": 32, "kvHeads": 8, "headDim": 128, "parameters": 8_000_000_000, "acceleratorMemory": "80Gi"}

OWNED_VALUES = {
    **{field: {} for field in OWNED_CONTAINER_FIELDS},
    "command": ["sh"],
    "args": ["--host=0.0.0.0"],
    "restartPolicy": "Never",
}

# The smallest object, and every field: both must pass, and every mutation starts from one of them.
SMALLEST: Service = {
    "apiVersion": "kvplane.dev/v1alpha1",
    "kind": "LLMService",
    "metadata": {"name": "chat"},
    "spec": {"model": {"source": HF}},
}
EVERYTHING: Service = {
    **SMALLEST,
    "spec": {
        "model": {
            "source": "hf://meta-llama/Llama-3.1-8B-Instruct@0123abc",
            "servedName": "llama",
            "tokenSecretRef": {"name": "hub", "key": "token"},
            "cache": {"claimName": "models"},
            "facts": FACTS,
        },
        "context": {"maxTokens": 32768, "ringThresholdTokens": 65536},
        "mode": "Paged",
        "replicas": 2,
        "engine": {
            "image": "registry.example.com/vllm:1",
            "dtype": "bfloat16",
            "kvCacheDtype": "fp8",
            "tensorParallelSize": 4,
            "resources": {
                "limits": {"nvidia.com/gpu": 4, "memory": "200Gi", "cpu": "8"},
                "requests": {"cpu": "500m", "memory": "100.5Gi"},
            },
            "env": [
                {"name": "NCCL_DEBUG", "value": "WARN"},
                {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "other", "key": "token"}}},
            ],
            "extraArgs": ["--enforce-eager", "--tokenizer", "acme/tokenizer", "--seed=1", "-1"],
            "blockSize": 32,
            "gpuMemoryPercent": 85,
            "startupTimeoutSeconds": 1800,
            "maxBatchedTokens": 8192,
            "maxSequences": 128,
            "prefixCaching": "Disabled",
            "speculative": {"method": "Draft", "tokens": 3, "model": "acme/draft"},
            "kvOffload": {"cpuMemory": "20Gi"},
            "kvTransfer": {"kv_connector": "NixlConnector", "kv_role": "kv_both"},
        },
        "slo": {"ttftMilliseconds": 1500, "tpotMilliseconds": 40},
        "admission": {
            "policy": "Observe",
            "reservation": "Worst",
            "kvHardCapPercent": 90,
            "kvPeakPercent": 100,
            "queue": {"maxRequests": 64, "maxWaitSeconds": 10},
            "fairness": {"header": "x-tenant", "tokensPerSecond": 5000},
            "priorities": ["interactive", "batch-1"],
            "maxBodyBytes": 1048576,
        },
        "autoscaling": {
            "policy": "Native",
            "minReplicas": 2,
            "maxReplicas": 20,
            "scaleToZeroAfterSeconds": 1800,
            "scaleDownWindowSeconds": 600,
            "costOfMiss": 8,
        },
        "rollout": {"maxSurge": 0, "maxUnavailable": 1},
        "disruption": {"pdb": "Off", "drainSeconds": 60},
        "podTemplate": {
            "metadata": {"labels": {"team": "a"}, "annotations": {"example.com/a": "b"}},
            "spec": {
                "nodeSelector": {"disk": "fast"},
                "containers": [
                    {"name": "engine", "securityContext": {"runAsUser": 1000}, "ports": [{"containerPort": 9999}]},
                    {"name": "logger", "image": "registry.example.com/logger:1", "args": ["-v"]},
                ],
                "initContainers": [{"name": "kvplane-sidecar", "resources": {"limits": {"memory": "2Gi"}}}],
            },
        },
    },
}


@pytest.fixture(scope="module")
def ask(control_plane: ControlPlane, make_namespace: Callable[..., str]) -> Ask:
    """The API server's refusal of an object, '' where it takes it."""
    path = f"/apis/kvplane.dev/v1alpha1/namespaces/{make_namespace()}/llmservices?dryRun=All&fieldValidation=Strict"

    def ask(service: Service) -> str:
        try:
            control_plane.api.request("POST", path, service)
        except ApiError as error:
            assert error.status in (400, 422), error
            return str(error)
        return ""

    return ask


def changed(base: Service, **fields: Any) -> Service:
    """``base`` with each field set; ``engine__blockSize=1`` sets spec.engine.blockSize."""
    service = copy.deepcopy(base)
    for path, value in fields.items():
        *parents, last = path.split("__")
        node = service["spec"]
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return service


FACTED = {"source": "pvc://models", "facts": FACTS}
PAGED_VALUES: dict[str, Any] = {
    "image": "a",
    "kvCacheDtype": "auto",
    "tensorParallelSize": 1,
    "extraArgs": ["--seed=1"],
    "blockSize": 16,
    "gpuMemoryPercent": 90,
    "maxBatchedTokens": 1024,
    "prefixCaching": "Enabled",
    "speculative": {"method": "Ngram"},
    "kvOffload": {"cpuMemory": "1Gi"},
    "kvTransfer": {"kv_connector": "A"},
}
assert tuple(PAGED_VALUES) == PAGED_ENGINE_FIELDS


def ring(**fields: Any) -> dict[str, Any]:
    """The fields of a ring of two, with these over them."""
    return {"mode": "Ring", "model": {"source": "pvc://models"}, "ring": {"size": 2}, **fields}


def scaled(**fields: Any) -> dict[str, Any]:
    """The fields of a service that scales itself up to 8, with these over them."""
    return {"autoscaling": {"policy": "Native", "maxReplicas": 8, **fields}}


def recovery(**fields: Any) -> dict[str, Any]:
    """The fields of a ring of two that recovers like this."""
    return ring(ring={"size": 2, "recovery": fields})


REFUSED: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    # model
    ("no model", {"model": {}}, ("spec.model.source: Required value",)),
    ("no scheme", {"model__source": "Qwen/Qwen3-8B"}, ("spec.model.source", "must begin with hf://, pvc://, oci://")),
    ("unknown scheme", {"model__source": "s3://b/m"}, ("spec.model.source", "must begin with hf://, pvc://, oci://")),
    ("hub without organisation", {"model__source": "hf://tiny"}, ("spec.model.source", "needs ORG/NAME")),
    ("hub with an empty revision", {"model__source": "hf://acme/tiny@"}, ("needs ORG/NAME, with @REVISION",)),
    ("hub with a query", {"model__source": "hf://acme/tiny?x=1"}, ("needs ORG/NAME",)),
    ("claim in capitals", {"model__source": "pvc://Models/x"}, ("spec.model.source", "needs CLAIM[/PATH]")),
    ("claim missing", {"model__source": "pvc:///x"}, ("needs CLAIM[/PATH], for example pvc://models/qwen3-8b",)),
    ("claim climbing out", {"model__source": "pvc://models/../x"}, ("must not contain '..'",)),
    ("image missing", {"model__source": "oci:///"}, ("needs an image reference",)),
    ("image with a space", {"model__source": "oci://a b"}, ("needs an image reference, for example oci://",)),
    ("relative directory", {"model__source": "path://srv/x"}, ("needs an absolute directory of the node",)),
    ("directory climbing out", {"model__source": "path:///srv/../etc"}, ("must not contain '..'",)),
    ("source too long", {"model__source": "hf://a/" + "b" * 512}, ("spec.model.source", "more than 512")),
    ("servedName empty", {"model__servedName": ""}, ("spec.model.servedName", "at least 1 chars")),
    ("token without hub", {"model": {"source": "pvc://m", "tokenSecretRef": {"name": "t"}}}, ("hf:// sources only",)),
    ("token without name", {"model__tokenSecretRef": {}}, ("spec.model.tokenSecretRef.name: Required value",)),
    (
        "token with a bad name",
        {"model__tokenSecretRef": {"name": "A_B"}},
        ("tokenSecretRef.name", "lower-case letters"),
    ),
    (
        "cache without hub",
        {"model": {"source": "oci://a/b", "cache": {"sizeLimit": "1Gi"}}},
        ("model.cache holds downloads of hf:// sources only; remove it",),
    ),
    ("cache of no kind", {"model__cache": {}}, ("spec.model.cache", "exactly one of claimName")),
    ("cache of both kinds", {"model__cache": {"claimName": "a", "sizeLimit": "1Gi"}}, ("exactly one of claimName",)),
    ("cache size in words", {"model__cache": {"sizeLimit": "40 GB"}}, ("cache.sizeLimit", "for example 40Gi")),
    ("cache size zero", {"model__cache": {"sizeLimit": "0"}}, ("cache.sizeLimit", "size in bytes above 0")),
    ("facts incomplete", {"model__facts": {"layers": 1}}, ("spec.model.facts.acceleratorMemory: Required value",)),
    ("facts of no layers", {"model__facts": {**FACTS, "layers": 0}}, ("facts.layers", "greater than or equal to 1")),
    ("facts of no heads", {"model__facts": {**FACTS, "kvHeads": 0}}, ("facts.kvHeads", "greater than or equal to 1")),
    ("facts of no dimension", {"model__facts": {**FACTS, "headDim": 0}}, ("headDim", "greater than or equal to 1")),
    ("facts of no weights", {"model__facts": {**FACTS, "parameters": 0}}, ("parameters", "greater than or equal to 1")),
    (
        "facts in milli-bytes",
        {"model__facts": {**FACTS, "acceleratorMemory": "80000m"}},
        ("spec.model.facts.acceleratorMemory", "size in bytes above 0", "for example 40Gi"),
    ),
    # context, mode, replicas
    ("context too short", {"context__maxTokens": 15}, ("context.maxTokens", "greater than or equal to 16")),
    ("context too long", {"context__maxTokens": HUGE}, ("context.maxTokens", "less than or equal to 100000000")),
    ("threshold too low", {"context__ringThresholdTokens": 1}, ("ringThresholdTokens", "equal to 16")),
    ("mode of a later version", {"mode": "Hybrid"}, ("spec.mode", 'supported values: "Auto", "Paged", "Ring"')),
    ("replicas below zero", {"replicas": -1}, ("spec.replicas", "greater than or equal to 0")),
    ("replicas beyond reason", {"replicas": HUGE}, ("spec.replicas", "less than or equal to 10000")),
    ("replicas in words", {"replicas": "two"}, ("spec.replicas", "must be of type integer")),
    # ring
    ("ring of a paged service", {"mode": "Paged", "ring": {"size": 2}}, ("ring is read in modes Ring and Auto",)),
    ("ring from the hub", ring(model={"source": HF}), ("model.source must be pvc://, oci:// or path://",)),
    ("ring of unknown size", ring(ring={}), ("mode Ring needs ring.size, or model.facts and context.maxTokens",)),
    ("ring with facts alone", ring(ring={}, model=FACTED), ("mode Ring needs ring.size, or model.facts and",)),
    *(
        (
            f"ring with {field}",
            ring(engine={field: value}),
            (f"mode Ring has no engine.{PAGED_ENGINE_FIELDS[0]}", field),
        )
        for field, value in PAGED_VALUES.items()
    ),
    ("ring in half precision", ring(engine={"dtype": "float16"}), ("engine.dtype must be one of these",)),
    *(
        (f"ring with env {name}", ring(engine={"env": [{"name": name}]}), ("remove them from engine.env", name))
        for name in RING_ENV
    ),
    *(
        (f"ring with {field}", ring(admission={field: value}), ("mode Ring has no admission.reservation", field))
        for field, value in (("reservation", "Expected"), ("kvHardCapPercent", 95), ("kvPeakPercent", 100))
    ),
    ("ring with a surge", ring(rollout={"maxSurge": 1}), ("rings are renewed one group after the other",)),
    ("too many rings", ring(replicas=1001), ("replicas of mode Ring are groups, at most 1000.",)),
    ("ring of one", ring(ring={"size": 1}), ("spec.ring.size", "greater than or equal to 2")),
    ("ring too large", ring(ring={"size": 257}), ("spec.ring.size", "less than or equal to 256")),
    ("window of nothing", ring(ring={"size": 2, "windowTokens": 0}), ("ring.windowTokens", "equal to 1")),
    ("spread unknown", ring(ring={"size": 2, "spread": "Never"}), ("ring.spread", '"Preferred", "Required"')),
    ("grace below zero", recovery(reformGraceSeconds=-1), ("reformGraceSeconds", "greater than or equal to 0")),
    ("budget below zero", recovery(restartBudget=-1), ("restartBudget", "greater than or equal to 0")),
    ("window too short", recovery(budgetWindowSeconds=59), ("budgetWindowSeconds", "greater than or equal to 60")),
    ("reserve unknown", recovery(reserve="Some"), ("recovery.reserve", '"None", "Survive"')),
    # engine
    ("dtype unknown", {"engine__dtype": "int4"}, ("spec.engine.dtype", '"bfloat16", "float32"')),
    ("KV dtype unknown", {"engine__kvCacheDtype": "int4"}, ("spec.engine.kvCacheDtype", '"fp8_e4m3"')),
    ("tensor parallel zero", {"engine__tensorParallelSize": 0}, ("tensorParallelSize", "greater than or equal to 1")),
    ("tensor parallel too large", {"engine__tensorParallelSize": 65}, ("less than or equal to 64",)),
    (
        "tensor parallel beside accelerators",
        {"engine__tensorParallelSize": 3, "engine__resources": {"limits": {"nvidia.com/gpu": 4}}},
        ("spec.engine", "engine.tensorParallelSize must divide the accelerators", "leave them out"),
    ),
    (
        "tensor parallel beside accelerators in a string",
        {"engine__tensorParallelSize": 3, "engine__resources": {"limits": {"nvidia.com/gpu": "4"}}},
        ("engine.tensorParallelSize must divide the accelerators",),
    ),
    (
        "accelerators in words",
        {"engine__tensorParallelSize": 2, "engine__resources": {"limits": {"nvidia.com/gpu": "two"}}},
        ("spec.engine.resources.limits", "must be Kubernetes quantities", "whole numbers, for example 4"),
    ),
    (
        "half an accelerator",
        {"engine__tensorParallelSize": 1, "engine__resources": {"limits": {"nvidia.com/gpu": "500m"}}},
        ("spec.engine.resources.limits", "extended resources such as nvidia.com/gpu must be whole numbers"),
    ),
    (
        "accelerators below zero",
        {"engine__resources": {"requests": {"nvidia.com/gpu": -1}}},
        ("spec.engine.resources.requests", "must be Kubernetes quantities"),
    ),
    ("memory in words", {"engine__resources": {"limits": {"memory": "80 GB"}}}, ("for example 500m, 2 or 80Gi",)),
    ("cpu as a fraction", {"engine__resources": {"limits": {"cpu": 0.5}}}, ("spec.engine.resources.limits.cpu",)),
    ("limit without end", {"engine__resources": {"limits": {"cpu": "1" * 33}}}, ("more than 32",)),
    ("env without name", {"engine__env": [{"value": "x"}]}, ("spec.engine.env[0].name: Required value",)),
    ("env of a bad name", {"engine__env": [{"name": "1 A"}]}, ("env[0].name", "not beginning with a digit")),
    ("env twice", {"engine__env": [{"name": "A"}, {"name": "A"}]}, ("spec.engine.env[1]: Duplicate value",)),
    (
        "env of the sidecar",
        {"engine__env": [{"name": "KVPLANE_X"}]},
        ("must not set KVPLANE_*", "model.tokenSecretRef"),
    ),
    *(
        (f"env {name}", {"engine__env": [{"name": name}]}, (f"engine.env must not set KVPLANE_*, {RESERVED_ENV[0]}",))
        for name in RESERVED_ENV
    ),
    (
        "env of two values",
        {"engine__env": [{"name": "A", "value": "b", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]},
        ("spec.engine.env", "take value or valueFrom, not both"),
    ),
    *(
        (f"argument {flag}", {"engine__extraArgs": [flag]}, ("spec.engine.extraArgs[0]", "use the field: see kubectl"))
        for flag in OWNED_ENGINE_FLAGS
    ),
    *(
        (f"argument {flag}", {"engine__extraArgs": ["--enforce-eager", flag]}, ("spec.engine.extraArgs[1]",))
        for flag in (
            "--host=0.0.0.0",
            "--max_model_len=1",
            "--served_model_name",
            "--speculative-config.method=ngram",
            "--hos",  # the engine's parser completes what is unambiguous
            "--max-model",
            "-t",
            "--",
        )
    ),
    ("argument empty", {"engine__extraArgs": [""]}, ("spec.engine.extraArgs[0]", "at least 1 chars")),
    ("arguments without end", {"engine__extraArgs": ["a"] * 65}, ("spec.engine.extraArgs", "at most 64 items")),
    ("block of nothing", {"engine__blockSize": 0}, ("spec.engine.blockSize", "greater than or equal to 1")),
    ("memory percent", {"engine__gpuMemoryPercent": 100}, ("gpuMemoryPercent", "less than or equal to 99")),
    ("memory percent too low", {"engine__gpuMemoryPercent": 9}, ("gpuMemoryPercent", "greater than or equal to 10")),
    (
        "start without time",
        {"engine__startupTimeoutSeconds": 9},
        ("startupTimeoutSeconds", "greater than or equal to 10"),
    ),
    ("start without end", {"engine__startupTimeoutSeconds": HUGE}, ("less than or equal to 86400",)),
    ("batch of nothing", {"engine__maxBatchedTokens": 0}, ("maxBatchedTokens", "greater than or equal to 1")),
    ("no sequence", {"engine__maxSequences": 0}, ("maxSequences", "greater than or equal to 1")),
    ("prefix caching as a boolean", {"engine__prefixCaching": True}, ("prefixCaching", "must be of type string")),
    ("prefix caching maybe", {"engine__prefixCaching": "Maybe"}, ('supported values: "Enabled", "Disabled"',)),
    ("draft without model", {"engine__speculative": {"method": "Draft"}}, ("speculative.model is needed for methods",)),
    ("ngram with model", {"engine__speculative": {"method": "Ngram", "model": "a/b"}}, ("refused for Ngram",)),
    ("method unknown", {"engine__speculative": {"method": "Medusa"}}, ('"Ngram", "Draft", "Eagle3"',)),
    ("no token ahead", {"engine__speculative": {"method": "Ngram", "tokens": 0}}, ("speculative.tokens", "equal to 1")),
    ("offload of nothing", {"engine__kvOffload": {"cpuMemory": "0"}}, ("kvOffload.cpuMemory", "above 0")),
    ("transfer as text", {"engine__kvTransfer": "{}"}, ("spec.engine.kvTransfer", "must be of type object")),
    # slo and admission
    ("no time to the first token", {"slo__ttftMilliseconds": 0}, ("ttftMilliseconds", "greater than or equal to 1")),
    ("first token after hours", {"slo__ttftMilliseconds": HUGE}, ("ttftMilliseconds", "less than or equal to 3600000")),
    (
        "a fraction of a millisecond",
        {"slo__tpotMilliseconds": 0.5},
        ("slo.tpotMilliseconds", "must be of type integer"),
    ),
    ("no time per token", {"slo__tpotMilliseconds": 0}, ("slo.tpotMilliseconds", "greater than or equal to 1")),
    ("time per token without end", {"slo__tpotMilliseconds": HUGE}, ("tpotMilliseconds", "than or equal to 600000")),
    ("policy unknown", {"admission__policy": "Strict"}, ("admission.policy", '"Enforce", "Observe", "Off"')),
    ("policy as YAML reads off", {"admission__policy": False}, ("spec.admission.policy", "must be of type string")),
    ("reservation unknown", {"admission__reservation": "Best"}, ("admission.reservation", '"Expected", "Worst"')),
    ("hard cap too low", {"admission__kvHardCapPercent": 49}, ("kvHardCapPercent", "greater than or equal to 50")),
    ("hard cap at the maximum", {"admission__kvHardCapPercent": 100}, ("kvHardCapPercent", "less than or equal to 99")),
    (
        "peak below the floor of what is learned",
        {"admission__kvPeakPercent": 84},
        ("spec.admission.kvPeakPercent", "greater than or equal to 85"),
    ),
    ("peak beyond reason", {"admission__kvPeakPercent": 201}, ("kvPeakPercent", "less than or equal to 200")),
    (
        "worst case beyond what fits",
        {"admission": {"reservation": "Worst", "kvPeakPercent": 101}},
        ("admission.kvPeakPercent above 100 admits more than fits", "set reservation: Expected"),
    ),
    (
        "queue below zero",
        {"admission__queue": {"maxRequests": -1}},
        ("queue.maxRequests", "greater than or equal to 0"),
    ),
    ("queue without end", {"admission__queue": {"maxRequests": HUGE}}, ("maxRequests", "than or equal to 100000")),
    ("wait of nothing", {"admission__queue": {"maxWaitSeconds": 0}}, ("maxWaitSeconds", "greater than or equal to 1")),
    ("wait for days", {"admission__queue": {"maxWaitSeconds": HUGE}}, ("maxWaitSeconds", "than or equal to 86400")),
    (
        "wait without a queue",
        {"admission__queue": {"maxRequests": 0, "maxWaitSeconds": 5}},
        ("spec.admission.queue", "a wait that maxRequests: 0 does not allow; remove one of them"),
    ),
    *(
        (
            f"tenant in {header!r}",
            {"admission__fairness": {"header": header}},
            ("spec.admission.fairness.header", "name of an HTTP header in lower case, for example x-tenant"),
        )
        for header in ("", "X-Tenant", "x tenant", "x-tenant:", "x-tänant", "x(tenant)")
    ),
    ("tenant in a long header", {"admission__fairness": {"header": "x" * 65}}, ("fairness.header", "more than 64")),
    ("no token", {"admission__fairness": {"tokensPerSecond": 0}}, ("tokensPerSecond", "greater than or equal to 1")),
    (
        "tokens without end",
        {"admission__fairness": {"tokensPerSecond": 2 * HUGE}},
        ("tokensPerSecond", "than or equal to"),
    ),
    ("no priority", {"admission__priorities": []}, ("spec.admission.priorities", "at least 1 items")),
    ("nine priorities", {"admission__priorities": list("abcdefghi")}, ("admission.priorities", "at most 8 items")),
    ("priority twice", {"admission__priorities": ["a", "b", "a"]}, ("name each class once, the highest first",)),
    ("long priority", {"admission__priorities": ["a" * 64]}, ("spec.admission.priorities[0]", "more than 63")),
    *(
        (
            f"priority {name!r}",
            {"admission__priorities": ["interactive", name]},
            ("spec.admission.priorities[1]", "names of lower-case letters, digits and '-', for example interactive"),
        )
        for name in ("", "High", "batch jobs", "-batch", "batch-")
    ),
    # autoscaling
    ("scaling by nobody", {"autoscaling": {"maxReplicas": 2}}, ("spec.autoscaling.policy: Required value",)),
    ("scaler unknown", scaled(policy="Auto"), ("autoscaling.policy", '"Off", "Native", "External"')),
    ("scaling as YAML reads off", scaled(policy=False), ("spec.autoscaling.policy", "must be of type string")),
    (
        "scaling without end",
        {"autoscaling": {"policy": "Native"}},
        ("spec.autoscaling", "autoscaling.policy Native needs autoscaling.maxReplicas"),
    ),
    ("minimum of none", scaled(minReplicas=0), ("autoscaling.minReplicas", "greater than or equal to 1")),
    ("maximum of none", scaled(maxReplicas=0), ("autoscaling.maxReplicas", "greater than or equal to 1")),
    ("maximum beyond reason", scaled(maxReplicas=HUGE), ("maxReplicas", "less than or equal to 10000")),
    (
        "minimum above the maximum",
        scaled(minReplicas=5, maxReplicas=4),
        ("autoscaling.maxReplicas must be at least autoscaling.minReplicas (1 where that is unset); raise it",),
    ),
    ("no time to zero", scaled(scaleToZeroAfterSeconds=0), ("scaleToZeroAfterSeconds", "greater than or equal to 1")),
    (
        "to zero by somebody else",
        scaled(policy="External", scaleToZeroAfterSeconds=60),
        ("autoscaling.scaleToZeroAfterSeconds is not read with policy External", "set policy: Native"),
    ),
    ("window below zero", scaled(scaleDownWindowSeconds=-1), ("scaleDownWindowSeconds", "greater than or equal to 0")),
    ("window without end", scaled(scaleDownWindowSeconds=HUGE), ("WindowSeconds", "less than or equal to 14400")),
    ("miss below zero", scaled(costOfMiss=-1), ("autoscaling.costOfMiss", "greater than or equal to 0")),
    ("miss as a fraction", scaled(costOfMiss=1.5), ("autoscaling.costOfMiss", "must be of type integer")),
    (
        "too many rings by themselves",
        ring(**scaled(maxReplicas=1001)),
        ("autoscaling.maxReplicas of mode Ring are groups, at most 1000.",),
    ),
    # the rest
    ("body too small", {"admission__maxBodyBytes": 1}, ("maxBodyBytes", "greater than or equal to 1024")),
    ("body too large", {"admission__maxBodyBytes": 2**31}, ("maxBodyBytes", "less than or equal to 1073741824")),
    (
        "rollout that cannot move",
        {"rollout": {"maxSurge": 0}},
        ("rollout.maxSurge and rollout.maxUnavailable must not both be 0", "set maxSurge: 0 and maxUnavailable: 1"),
    ),
    ("surge below zero", {"rollout": {"maxSurge": -1}}, ("rollout.maxSurge", "greater than or equal to 0")),
    ("pdb unknown", {"disruption__pdb": "On"}, ("spec.disruption.pdb", '"Auto", "Off"')),
    ("drain below zero", {"disruption__drainSeconds": -1}, ("drainSeconds", "greater than or equal to 0")),
    (
        "label of the operator",
        {"podTemplate__metadata": {"labels": {"kvplane.dev/service": "x"}}},
        ("podTemplate.metadata.labels must not set kvplane.dev/*", "selectors use them"),
    ),
    ("label of Kubernetes", {"podTemplate__metadata": {"labels": {"app.kubernetes.io/name": "x"}}}, ("selectors use",)),
    (
        "annotation of the operator",
        {"podTemplate__metadata": {"annotations": {"kvplane.dev/config-hash": "x"}}},
        ("podTemplate.metadata.annotations must not set kvplane.dev/*",),
    ),
    *(
        (f"overlay of {field}", {"podTemplate__spec": {field: value}}, ("podTemplate.spec must not set", field))
        for field, value in {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 5,
            "hostNetwork": True,
            "hostPID": True,
            "shareProcessNamespace": True,
        }.items()
    ),
    *(
        (
            f"overlay of {name}'s {field}",
            {"podTemplate__spec": {containers: [{"name": name, field: value}]}},
            (f"podTemplate.spec.{containers} must not set", f"of {name}: the engine stays behind the sidecar"),
        )
        for containers, name in (("containers", "engine"), ("initContainers", "kvplane-sidecar"))
        for field, value in OWNED_VALUES.items()
    ),
    # unknown fields
    ("field of a later version", {"tenancy": {"size": 2}}, ('unknown field "spec.tenancy"',)),
    ("misspelt field", {"engine__tensorParalelSize": 2}, ('unknown field "spec.engine.tensorParalelSize"',)),
)


@pytest.mark.parametrize(("fields", "texts"), [pytest.param(f, t, id=name) for name, f, t in REFUSED])
def test_refused_with_a_reason(ask: Ask, fields: dict[str, Any], texts: tuple[str, ...]) -> None:
    refusal = ask(changed(SMALLEST, **fields))
    assert refusal, "the API server took it"
    for text in texts:
        assert text in refusal


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x" * 44, "metadata.name must be at most 43 characters"),
        ("1chat", "metadata.name must begin with a letter"),
        ("a.b", "metadata.name must begin with a letter and have only lower-case letters, digits and '-'"),
    ],
)
def test_names_that_no_service_can_have(ask: Ask, name: str, text: str) -> None:
    assert text in ask({**SMALLEST, "metadata": {"name": name}})


ACCEPTED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("one replica by itself", scaled(minReplicas=1, maxReplicas=1)),
    ("from zero and back", scaled(scaleToZeroAfterSeconds=1, scaleDownWindowSeconds=0, costOfMiss=0)),
    ("scaling switched off and kept", scaled(policy="Off", scaleToZeroAfterSeconds=60)),
    ("scaling by somebody else", {"autoscaling": {"policy": "External"}}),
    ("scaling by somebody else within bounds", scaled(policy="External", minReplicas=2)),
    ("rings by themselves", ring(**scaled(maxReplicas=1000))),
    ("ring of two", ring()),
    ("ring planned from facts", ring(ring={}, model=FACTED, context={"maxTokens": 10**6})),
    ("ring that Auto may choose", {"ring": {"size": 2}}),
    ("ring without a budget", recovery(restartBudget=0, reformGraceSeconds=0)),
    (
        "ring with every field",
        ring(
            replicas=1000,
            engine={"dtype": "bfloat16", "maxSequences": 8, "startupTimeoutSeconds": 60, "env": [{"name": "A"}]},
            admission={"policy": "Observe", "queue": {"maxRequests": 8}},
            ring={
                "size": 256,
                "windowTokens": 4096,
                "image": "a",
                "resources": {"limits": {"nvidia.com/gpu": 1}},
                "spread": "Required",
                "recovery": {
                    "reformGraceSeconds": 30,
                    "restartBudget": 5,
                    "budgetWindowSeconds": 3600,
                    "reserve": "Survive",
                },
            },
        ),
    ),
    *(
        (source, {"model__source": source})
        for source in (
            "hf://Qwen/Qwen3-8B",
            "hf://Qwen/Qwen3-8B@main",
            "hf://Qwen/Qwen3-8B@refs/pr/1",
            "pvc://models",
            "pvc://models/",
            "pvc://models/qwen3-8b/v1.0",
            "oci://registry.example.com:5000/models/qwen3-8b:1",
            "oci://models/tiny@sha256:" + "0" * 64,
            "path:///srv/models/qwen3-8b",
        )
    ),
    ("cache in a claim", {"model__cache": {"claimName": "models"}}),
    ("cache in the pod", {"model__cache": {"sizeLimit": "40Gi"}}),
    ("no replica", {"replicas": 0}),
    ("no accelerator", {"engine__resources": {"limits": {"nvidia.com/gpu": 0}}, "engine__tensorParallelSize": 2}),
    (
        "accelerators as a string",
        {"engine__resources": {"limits": {"nvidia.com/gpu": "4"}}, "engine__tensorParallelSize": 2},
    ),
    ("another accelerator", {"engine__resources": {"limits": {"amd.com/gpu": 1, "nvidia.com/gpu": 0}}}),
    ("ngram", {"engine__speculative": {"method": "Ngram"}}),
    ("eagle", {"engine__speculative": {"method": "Eagle3", "model": "acme/eagle"}}),
    ("nothing waits", {"admission__queue": {"maxRequests": 0}}),
    ("worst case up to all that fits", {"admission": {"reservation": "Worst", "kvPeakPercent": 100}}),
    ("more than fits, as is expected", {"admission": {"reservation": "Expected", "kvPeakPercent": 110}}),
    ("a bound for all without tenants", {"admission__fairness": {"tokensPerSecond": 1_000_000_000}}),
    ("an API key as the tenant", {"admission__fairness": {"header": "authorization"}}),
    ("eight priorities", {"admission__priorities": list("abcdefgh")}),
    ("no surge but one below", {"rollout": {"maxSurge": 0, "maxUnavailable": 1}}),
    ("free flag that begins an owned one", {"engine__extraArgs": ["--tokenizer", "a/b"]}),
)


@pytest.mark.parametrize("fields", [pytest.param(fields, id=name) for name, fields in ACCEPTED])
def test_accepted(ask: Ask, fields: dict[str, Any]) -> None:
    assert ask(changed(SMALLEST, **fields)) == ""


@pytest.mark.parametrize("service", [pytest.param(SMALLEST, id="smallest"), pytest.param(EVERYTHING, id="everything")])
def test_bases_are_accepted(ask: Ask, service: Service) -> None:
    assert ask(service) == ""


def test_longest_name_is_accepted(ask: Ask) -> None:
    assert ask({**SMALLEST, "metadata": {"name": "x" * 43}}) == ""


def test_every_cel_rule_is_refused_by_some_case(ask: Ask) -> None:
    """A rule without a case here could be wrong without anybody noticing."""
    from kvplane_api.crd import custom_resource_definition

    refusals = "\n".join(
        [ask(changed(SMALLEST, **fields)) for _, fields, _ in REFUSED]
        + [ask({**SMALLEST, "metadata": {"name": name}}) for name in ("x" * 44, "1chat")]
    )
    messages = set(_messages(custom_resource_definition()))
    assert messages
    assert [message for message in messages if message not in refusals] == []


def _messages(node: Any) -> list[str]:
    if isinstance(node, list):
        return [message for item in node for message in _messages(item)]
    if not isinstance(node, dict):
        return []
    own = [rule["message"] for rule in node.get("x-kubernetes-validations", ()) if isinstance(rule, dict)]
    return own + [message for item in node.values() for message in _messages(item)]
