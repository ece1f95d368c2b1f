"""The rights that the chart gives are enough for the operator, and it makes use of each."""

import json
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from e2e.cluster.errors import CommandError
from tests.chart.helm import Helm, Rendered, rights
from tests.chart.installation import await_served, get, get_all, installed, is_gone
from tests.chart.recorder import Right
from tests.integration.conftest import Cluster, eventually, llmservice

ASKED_FOR_BY_ADMISSION: Final[set[Right]] = {("update", "kvplane.dev", "llmservices/finalizers")}
"""Used inside of the API server, where no recorder sees it."""


@pytest.mark.parametrize("scope", ["everywhere", "one-namespace"])
def test_the_operator_needs_each_right_and_no_other(cluster: Cluster, tmp_path: Path, scope: str) -> None:
    models, others = f"{scope}-models", f"{scope}-others"
    for name in (models, others):
        cluster.kubectl("create", "namespace", name)
    watched = [models] if scope == "one-namespace" else []
    with installed(cluster, tmp_path, scope, values={"watchNamespaces": watched}) as installation:
        assert bool(installation.rendered.of("ClusterRole")) == (scope == "everywhere")
        await_served(cluster)
        account = f"system:serviceaccount:{scope}:{installation.rendered.pod['spec']['serviceAccountName']}"
        look = partial(_knows_owners, cluster, models, account)
        eventually(look, seconds=120, what="the API server's look at the new kind")
        cluster.apply(llmservice("elsewhere", others))
        with installation.operator() as operator:
            everything_a_service_causes(cluster, models)

            assert bool(get(cluster, others, "deployment elsewhere")) == (scope == "everywhere")

            # It waits for a renewal of the Lease, so that one is among what was recorded.
            tested = installation.selftest(seconds=20)
            assert tested.returncode == 0, tested.stderr
            assert f"{'7 of them in' if watched else '8 of them in all namespaces'}" in tested.stdout
            assert f"{operator.identity} leads" in tested.stdout

            assert installation.recorder.refused == []
            assert installation.recorder.used | ASKED_FOR_BY_ADMISSION == given_rights(installation.rendered)
            assert operator.stop() == 0
        failed = installation.selftest(seconds=0)
        assert failed.returncode == 1
        assert f"FAILED: Nobody holds the Lease {scope}/" in failed.stderr
        for namespace in (models, others):
            cluster.kubectl("delete", "llms", "--all", "-n", namespace)


@pytest.mark.parametrize("watched", [[], ["models"]], ids=["everywhere", "one-namespace"])
def test_what_it_must_not_do(helm: Helm, watched: list[str]) -> None:
    given = given_rights(helm.render(values={"watchNamespaces": watched}))
    assert not [part for right in given for part in right if "*" in part]
    assert not {resource for _, _, resource in given} & {"secrets", "pods/log", "pods/exec", "nodes", "namespaces"}


def given_rights(rendered: Rendered) -> set[Right]:
    """All that the release's roles give."""
    return {right for kind in ("ClusterRole", "Role") for role in rendered.of(kind) for right in rights(role["rules"])}


def everything_a_service_causes(cluster: Cluster, namespace: str) -> None:
    """Create, reconfigure, scale, tidy: every kind of request that the operator knows."""
    cluster.apply(llmservice("chat", namespace, replicas=2))
    for child in ("deployment chat", "service chat", "service chat-pods", "configmap chat", "poddisruptionbudget chat"):
        eventually(partial(get, cluster, namespace, child), what=child)
    eventually(lambda: (get(cluster, namespace, "llmservice chat") or {}).get("status"), what="a status")
    eventually(lambda: get_all(cluster, namespace, "event"), what="an event")
    eventually(lambda: len(get_all(cluster, namespace, "pod")) == 2, what="pods")

    before = _pods_config(cluster, namespace)
    change = json.dumps({"spec": {"admission": {"maxBodyBytes": 1 << 20}, "replicas": 1}})
    cluster.kubectl("patch", "llms", "chat", "-n", namespace, "--type=merge", f"--patch={change}")
    eventually(partial(is_gone, cluster, namespace, "poddisruptionbudget chat"), what="no budget for one pod")
    eventually(lambda: _pods_config(cluster, namespace).isdisjoint(before), what="the pod told of its configuration")

    # The name of a child belongs to somebody else, in one service for each kind.
    for kind in OBJECTS:
        name = f"taken-{kind.lower()}"
        spec = _RING if kind == "StatefulSet" else {"replicas": 2}
        taken = f"{name}-ring-0" if kind == "StatefulSet" else name
        cluster.apply(_object(kind, taken, namespace), llmservice(name, namespace, **spec))
        eventually(partial(_conflicts, cluster, namespace, name), what=f"ChildConflict by a {kind}")

    # Rings: none forms here, so a change of the spec renews the group at once.
    cluster.apply(llmservice("ring", namespace, **_RING))
    eventually(partial(get, cluster, namespace, "statefulset ring-ring-0"), what="a ring group")
    eventually(lambda: len(_ranks(cluster, namespace)) == 2, what="ranks")
    ranks = _ranks(cluster, namespace)
    change = json.dumps({"spec": {"engine": {"env": [{"name": "A", "value": "b"}]}}})
    cluster.kubectl("patch", "llms", "ring", "-n", namespace, "--type=merge", f"--patch={change}")
    eventually(lambda: _ranks(cluster, namespace).isdisjoint(ranks), what="ranks of the new template")

    # Owned and not wanted, as after an upgrade that names a child otherwise.
    owner = cluster.kubectl("get", "llms", "chat", "-n", namespace, "-o", "jsonpath={.metadata.uid}")
    cluster.apply(*(_object(kind, "stray", namespace, owner=owner) for kind in OBJECTS))
    for kind in OBJECTS:
        eventually(partial(is_gone, cluster, namespace, f"{kind.lower()} stray"), what=f"no {kind} stray")


_LABELS = {"matchLabels": {"app": "other"}}
OBJECTS: Final[dict[str, dict[str, Any]]] = {
    "Deployment": {
        "apiVersion": "apps/v1",
        "spec": {
            "replicas": 0,
            "selector": _LABELS,
            "template": {
                "metadata": {"labels": _LABELS["matchLabels"]},
                "spec": {"containers": [{"name": "other", "image": "other"}]},
            },
        },
    },
    "StatefulSet": {
        "apiVersion": "apps/v1",
        "spec": {
            "replicas": 0,
            "serviceName": "other",
            "selector": _LABELS,
            "template": {
                "metadata": {"labels": _LABELS["matchLabels"]},
                "spec": {"containers": [{"name": "other", "image": "other"}]},
            },
        },
    },
    "Service": {"apiVersion": "v1", "spec": {"ports": [{"port": 80}]}},
    "ConfigMap": {"apiVersion": "v1", "data": {}},
    "PodDisruptionBudget": {"apiVersion": "policy/v1", "spec": {"maxUnavailable": 1, "selector": _LABELS}},
}
"""The smallest object of each kind of child."""


def _object(kind: str, name: str, namespace: str, *, owner: str = "") -> dict[str, Any]:
    """An object of nobody, or of the service "chat" if its uid is given."""
    metadata: dict[str, Any] = {"name": name, "namespace": namespace}
    if owner:
        reference = {"apiVersion": "kvplane.dev/v1alpha1", "kind": "LLMService", "name": "chat", "uid": owner}
        metadata["labels"] = {"kvplane.dev/service": "chat"}
        metadata["ownerReferences"] = [reference | {"controller": True}]
    return {"kind": kind, "metadata": metadata, **OBJECTS[kind]}


_RING: Final[dict[str, Any]] = {
    "model": {"source": "pvc://models"},
    "mode": "Ring",
    "ring": {"size": 2, "image": "ring", "recovery": {"reformGraceSeconds": 0}},
}


def _ranks(cluster: Cluster, namespace: str) -> set[str]:
    """The uids of the pods of the service "ring"."""
    pods = get_all(cluster, namespace, "pod")
    mine = (pod for pod in pods if pod["metadata"]["labels"].get("kvplane.dev/service") == "ring")
    return {pod["metadata"]["uid"] for pod in mine if "deletionTimestamp" not in pod["metadata"]}


def _knows_owners(cluster: Cluster, namespace: str, account: str) -> bool:
    """Whether the account may name an LLMService as owner.

    The API server looks for new kinds of owners every 30 seconds only, and forbids references to others till then.
    """
    owned = _object("ConfigMap", "owned", namespace, owner="5f6c7dd2-7a0e-4b0c-8f0e-6d8a3a0f1b11")
    owned["metadata"]["ownerReferences"][0]["blockOwnerDeletion"] = True
    try:
        cluster.kubectl("create", f"--as={account}", "--dry-run=server", "-f", "-", stdin=json.dumps(owned))
    except CommandError as error:
        assert "cannot find RESTMapping" in str(error), error
        return False
    return True


def _conflicts(cluster: Cluster, namespace: str, name: str) -> bool:
    return "ChildConflict" in json.dumps(get(cluster, namespace, f"llmservice {name}"))


def _pods_config(cluster: Cluster, namespace: str) -> set[str | None]:
    pods = [pod for pod in get_all(cluster, namespace, "pod") if "deletionTimestamp" not in pod["metadata"]]
    return {pod["metadata"].get("annotations", {}).get("kvplane.dev/config-hash") for pod in pods}
