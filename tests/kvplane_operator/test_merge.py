"""Overlays and drift: keyed lists are maps, defaults are not drift, and no change of an owned value is missed."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane_operator.plan.merge import departures, overlay

_scalars = st.one_of(st.integers(1, 9), st.sampled_from(["a", "b", "500m"]), st.just(True))
_named = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from(["a", "b", "c"])}, optional={"value": _scalars, "args": st.lists(_scalars)}
    ),
    unique_by=lambda item: str(item["name"]),
)
manifests = st.recursive(
    st.dictionaries(st.sampled_from(["x", "y", "z"]), _scalars),
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "spec": inner,
            "containers": _named,
            "env": _named,
            "args": st.lists(_scalars, max_size=3),
            "x": _scalars,
        },
    ),
    max_leaves=4,
)


def found(wanted: Any, observed: Any) -> list[str]:
    return list(departures(wanted, observed))


class TestOverlay:
    def test_scalars_are_replaced_and_maps_merged(self) -> None:
        assert overlay({"a": 1, "b": {"c": 2}}, {"b": {"d": 3}, "a": 4}) == {"a": 4, "b": {"c": 2, "d": 3}}

    def test_keyed_lists_are_merged_in_the_first_ones_order(self) -> None:
        base = {"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]}
        patch = {"env": [{"name": "C", "value": "3"}, {"name": "A", "value": "4"}]}
        assert [(e["name"], e["value"]) for e in overlay(base, patch)["env"]] == [("A", "4"), ("B", "2"), ("C", "3")]

    def test_mounts_are_keyed_by_path(self) -> None:
        base = {"volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}]}
        patch = {"volumeMounts": [{"name": "tmp", "mountPath": "/scratch"}]}
        assert len(overlay(base, patch)["volumeMounts"]) == 2

    def test_other_lists_are_replaced(self) -> None:
        assert overlay({"args": ["a", "b"]}, {"args": ["c"]}) == {"args": ["c"]}

    @given(manifests)
    def test_nothing_over_a_manifest_is_the_manifest(self, manifest: dict[str, Any]) -> None:
        assert overlay(manifest, {}) == manifest
        assert overlay(manifest, manifest) == manifest

    @given(manifests, manifests)
    def test_the_patch_stands_in_the_result(self, base: dict[str, Any], patch: dict[str, Any]) -> None:
        assert found(patch, overlay(base, patch)) == []

    @given(manifests, manifests)
    def test_arguments_stay_as_they_are(self, base: dict[str, Any], patch: dict[str, Any]) -> None:
        before = copy.deepcopy((base, patch))
        overlay(base, patch)
        assert (base, patch) == before


class TestDepartures:
    @given(manifests, st.integers(0, 10_000))
    def test_what_the_api_server_adds_is_no_drift(self, manifest: dict[str, Any], seed: int) -> None:
        assert found(manifest, with_defaults(manifest, seed)) == []

    @pytest.mark.parametrize(
        ("wanted", "observed", "path"),
        [
            ({"spec": {"replicas": 2}}, {"spec": {"replicas": 3}}, ".spec.replicas"),
            ({"spec": {"replicas": 2}}, {}, ".spec"),
            ({"labels": {"a": "b"}}, {"labels": {"a": "c", "d": "e"}}, ".labels.a"),
            (
                {"containers": [{"name": "engine", "image": "a"}]},
                {"containers": [{"name": "x"}, {"name": "engine", "image": "b"}]},
                ".containers[engine].image",
            ),
            ({"containers": [{"name": "engine"}]}, {"containers": [{"name": "other"}]}, ".containers[engine]"),
            ({"args": ["a", "b"]}, {"args": ["a", "c"]}, ".args[1]"),
            ({"args": ["a"]}, {"args": ["a", "b"]}, ".args"),
            ({"args": ["a"]}, {}, ".args"),
            ({"limits": {"memory": "1Gi"}}, {"limits": {"memory": "2Gi"}}, ".limits.memory"),
            ({"value": "1"}, {"value": 1}, ".value"),
            ({"readOnly": True}, {}, ".readOnly"),
        ],
    )
    def test_the_path_is_named(self, wanted: Any, observed: Any, path: str) -> None:
        assert found(wanted, observed) == [path]

    @pytest.mark.parametrize(
        ("wanted", "observed"),
        [
            ({"limits": {"memory": "1024Mi", "cpu": "0.5"}}, {"limits": {"memory": "1Gi", "cpu": "500m"}}),
            ({"emptyDir": {"sizeLimit": "1024Mi"}}, {"emptyDir": {"sizeLimit": "1Gi"}}),
            ({"value": ""}, {}),
            ({"readOnly": False}, {}),
            ({"annotations": {}}, {}),
            ({"env": []}, {}),
            ({"clusterIP": None}, {}),
            (
                {"ports": [{"containerPort": 1, "protocol": "TCP"}]},
                {"ports": [{"containerPort": 1, "protocol": "TCP"}]},
            ),
            ({"ports": [{"port": 1, "protocol": "TCP"}]}, {"ports": [{"port": 1, "nodePort": 3, "protocol": "TCP"}]}),
        ],
    )
    def test_what_the_api_server_rewrites_is_no_drift(self, wanted: Any, observed: Any) -> None:
        assert found(wanted, observed) == []

    @pytest.mark.parametrize("field", ["value", "image", "name"])
    def test_only_quantities_are_compared_as_quantities(self, field: str) -> None:
        assert found({field: "1Gi"}, {field: "1024Mi"}) == [f".{field}"]


def with_defaults(node: Any, seed: int) -> Any:
    """As the API server would give it back: more fields, more items of keyed lists, other orders."""
    if isinstance(node, dict):
        return {f"default{seed % 3}": seed, **{key: _listed(key, value, seed) for key, value in node.items()}}
    return node


def _listed(key: str, value: Any, seed: int) -> Any:
    if key in ("containers", "env") and value:
        items = [with_defaults(item, seed + 1) for item in value]
        added = {"name": "injected"}
        return [added, *reversed(items)] if seed % 2 else [*items, added]
    return with_defaults(value, seed + 1) if isinstance(value, dict) else value
