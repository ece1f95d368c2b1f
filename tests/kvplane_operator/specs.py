"""Hypothesis strategies: specs as the API server would accept them."""

from typing import Any

from hypothesis import strategies as st


def _name(item: Any) -> str:
    return str(item["name"])


_sizes = st.sampled_from(["1Gi", "1.5Gi", "2000M", "40Gi"])
_values = st.sampled_from(["", "a", "b", "0"])

_hub = st.fixed_dictionaries(
    {"source": st.sampled_from(["hf://acme/tiny", "hf://acme/tiny@v1"])},
    optional={
        "servedName": st.sampled_from(["tiny", "other"]),
        "tokenSecretRef": st.fixed_dictionaries({"name": st.just("hub")}, optional={"key": st.just("hf")}),
        "cache": st.one_of(
            st.fixed_dictionaries({"claimName": st.just("m")}), st.fixed_dictionaries({"sizeLimit": _sizes})
        ),
    },
)
_mounted = st.fixed_dictionaries(
    {"source": st.sampled_from(["pvc://models", "pvc://models/x/y", "oci://example.com/m:1"])}
)
_resources = st.dictionaries(
    st.sampled_from(["cpu", "memory", "nvidia.com/gpu"]), st.one_of(st.integers(0, 8), st.sampled_from(["1", "2"]))
)
_engine = st.fixed_dictionaries(
    {},
    optional={
        "image": st.just("example.com/engine:2"),
        "dtype": st.sampled_from(["auto", "bfloat16"]),
        "kvCacheDtype": st.sampled_from(["auto", "fp8"]),
        "tensorParallelSize": st.sampled_from([1, 2, 4]),
        "resources": st.fixed_dictionaries({}, optional={"limits": _resources, "requests": _resources}),
        "env": st.lists(
            st.fixed_dictionaries({"name": st.sampled_from(["A", "B", "HOME"])}, optional={"value": _values}),
            unique_by=_name,
        ),
        "extraArgs": st.lists(st.sampled_from(["--enforce-eager", "--seed=1"]), max_size=2),
        "blockSize": st.sampled_from([16, 32]),
        "startupTimeoutSeconds": st.integers(10, 86_400),
        "prefixCaching": st.sampled_from(["Enabled", "Disabled"]),
        "kvOffload": st.fixed_dictionaries({"cpuMemory": _sizes}),
        "kvTransfer": st.dictionaries(st.sampled_from(["kv_connector", "kv_role"]), _values),
    },
)
_admission_of_both = {
    "policy": st.sampled_from(["Enforce", "Observe", "Off"]),
    "queue": st.fixed_dictionaries({}, optional={"maxRequests": st.integers(1, 500)}),
    "fairness": st.fixed_dictionaries({}, optional={"header": st.just("x-tenant")}),
    "priorities": st.lists(st.sampled_from(["interactive", "batch"]), min_size=1, unique=True),
    "maxBodyBytes": st.integers(1024, 2**30),
}
_ring_admission = st.fixed_dictionaries({}, optional=_admission_of_both)
_admission = st.fixed_dictionaries({}, optional={**_admission_of_both, "kvPeakPercent": st.integers(85, 100)})
# Not Native: its replicas depend on what was there before, see test_scaling_plan.
_autoscaling = st.fixed_dictionaries(
    {"policy": st.sampled_from(["Off", "External"])},
    optional={"minReplicas": st.integers(1, 3), "maxReplicas": st.integers(3, 8)},
)
_pod_template = st.fixed_dictionaries(
    {},
    optional={
        "metadata": st.fixed_dictionaries({"labels": st.dictionaries(st.sampled_from(["team", "tier"]), _values)}),
        "spec": st.fixed_dictionaries(
            {},
            optional={
                "nodeSelector": st.dictionaries(st.sampled_from(["disk", "zone"]), _values),
                "tolerations": st.lists(st.fixed_dictionaries({"operator": st.just("Exists")}), max_size=1),
                "containers": st.lists(
                    st.fixed_dictionaries(
                        {"name": st.sampled_from(["engine", "logger"])}, optional={"tty": st.booleans()}
                    ),
                    unique_by=_name,
                ),
            },
        ),
    },
)

_ring = st.fixed_dictionaries(
    {"size": st.integers(2, 4)},
    optional={
        "windowTokens": st.sampled_from([1024, 4096]),
        "image": st.just("example.com/ring:2"),
        "resources": st.fixed_dictionaries({}, optional={"limits": _resources, "requests": _resources}),
        "spread": st.sampled_from(["Preferred", "Required"]),
        "recovery": st.fixed_dictionaries(
            {},
            optional={
                "reformGraceSeconds": st.sampled_from([0, 30]),
                "restartBudget": st.integers(0, 5),
                "reserve": st.sampled_from(["None", "Survive"]),
            },
        ),
    },
)
_ring_engine = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["auto", "bfloat16"]),
        "maxSequences": st.integers(1, 64),
        "startupTimeoutSeconds": st.integers(10, 86_400),
        "env": st.just([{"name": "A", "value": "b"}]),
    },
)

_ring_specs: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"model": _mounted, "mode": st.just("Ring"), "ring": _ring},
    optional={
        "replicas": st.integers(0, 3),
        "autoscaling": _autoscaling,
        "engine": _ring_engine,
        "admission": _ring_admission,
        "disruption": st.fixed_dictionaries(
            {}, optional={"pdb": st.sampled_from(["Auto", "Off"]), "drainSeconds": st.integers(0, 600)}
        ),
        "podTemplate": _pod_template,
    },
)

_paged_specs: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"model": st.one_of(_hub, _mounted)},
    optional={
        "context": st.fixed_dictionaries({}, optional={"maxTokens": st.integers(16, 100_000)}),
        "mode": st.sampled_from(["Auto", "Paged"]),
        "replicas": st.integers(0, 5),
        "autoscaling": _autoscaling,
        "engine": _engine,
        "slo": st.fixed_dictionaries({}, optional={"ttftMilliseconds": st.integers(1, 10_000)}),
        "admission": _admission,
        "rollout": st.fixed_dictionaries({"maxSurge": st.integers(1, 3), "maxUnavailable": st.integers(0, 3)}),
        "disruption": st.fixed_dictionaries(
            {}, optional={"pdb": st.sampled_from(["Auto", "Off"]), "drainSeconds": st.integers(0, 600)}
        ),
        "podTemplate": _pod_template,
    },
)

specs: st.SearchStrategy[dict[str, Any]] = st.one_of(_paged_specs, _ring_specs)
"""Specs that the operator accepts."""
