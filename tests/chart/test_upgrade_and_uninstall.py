"""Install, upgrade, roll back, uninstall: on a real API server with its controllers; the end-to-end tests do it with pods."""

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from charts.generate import CHART
from tests.chart.helm import NAMESPACE, RELEASE, Helm, Manifest
from tests.chart.installation import Installation, await_served, get, get_all, installed, is_gone
from tests.integration.conftest import Cluster, eventually, llmservice

CRD = "crd llmservices.kvplane.dev"
CHILDREN = ("deployment chat", "service chat", "service chat-pods", "configmap chat")


def test_the_life_of_a_release(cluster: Cluster, tmp_path: Path) -> None:
    older = older_chart(tmp_path)
    with installed(cluster, tmp_path, NAMESPACE, chart=older, values={"replicas": 1}) as installation:
        await_served(cluster)
        admitted_by_pod_security_restricted(cluster, installation)
        assert "Reason" not in columns(cluster)
        helm = Helm(tmp_path, cluster.kubeconfig)

        def change(verb: str, *what: str, values: Mapping[str, object] | None = None) -> str:
            return helm.must(verb, RELEASE, *what, f"--namespace={NAMESPACE}", values=values)

        notes = helm.must("get", "notes", RELEASE, f"--namespace={NAMESPACE}")
        sample = notes[notes.index("  apiVersion") : notes.index("  EOF")]
        assert "created" in cluster.kubectl("apply", "--dry-run=server", "-f", "-", stdin=sample)

        with installation.operator():
            cluster.apply(llmservice("chat", "default"))
            eventually(lambda: all(get(cluster, "default", child) for child in CHILDREN), what="children")
        before = uids(cluster)

        change("upgrade", str(CHART), values={"replicas": 3, "image.tag": "next"})
        assert "Reason" in columns(cluster)
        assert operator(cluster) == (3, "kvplane/control:next")

        change("upgrade", str(CHART), values={"crds.install": False})
        assert operator(cluster) == (2, f"kvplane/control:{version(CHART)}")

        change("rollback", "1")
        assert "Reason" not in columns(cluster)
        assert operator(cluster) == (1, "kvplane/control:0.0.1")

        assert uids(cluster) == before
        assert "llmservices.kvplane.dev" in change("uninstall")
    assert uids(cluster) == before
    for kind in ("deployment", "service", "poddisruptionbudget", "role", "rolebinding"):
        assert get_all(cluster, NAMESPACE, kind) == []
    for kind in ("clusterrole", "clusterrolebinding"):
        assert not [o for o in get_all(cluster, "", kind) if o["metadata"]["name"].endswith(NAMESPACE)]

    cluster.kubectl("delete", "llms", "chat", "-n", "default", "--timeout=30s")
    for child in CHILDREN:
        eventually(partial(is_gone, cluster, "default", child), what=f"{child} to go, without an operator")


def test_without_the_crd_the_selftest_says_so(cluster: Cluster, tmp_path: Path) -> None:
    cluster.kubectl("delete", *CRD.split(), "--ignore-not-found")
    with installed(cluster, tmp_path, "no-crd", values={"crds.install": False}) as installation:
        assert get(cluster, "", CRD) is None
        failed = installation.selftest(seconds=0)
    assert failed.returncode == 1
    assert (
        "FAILED: The API server does not serve llmservices.kvplane.dev: install the chart with crds.install=true"
        in failed.stderr
    )


def older_chart(folder: Path) -> Path:
    """The chart as an earlier release could have been: other version, and a CRD without the last column."""
    older = folder / "older" / CHART.name
    shutil.copytree(CHART, older)
    chart, crd = older / "Chart.yaml", older / "templates" / "crd.yaml"
    chart.write_text(chart.read_text().replace(f"ersion: {version(CHART)}", "ersion: 0.0.1"))
    head, column, end = crd.read_text().rpartition('        - name: "Reason"')
    assert column
    crd.write_text(head + end[end.index("{{- end }}") :])
    return older


def version(chart: Path) -> str:
    lines = (chart / "Chart.yaml").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("appVersion:"))


def columns(cluster: Cluster) -> list[str]:
    crd = present(cluster, "", CRD)
    return [column["name"] for column in crd["spec"]["versions"][0]["additionalPrinterColumns"]]


def operator(cluster: Cluster) -> tuple[int, str]:
    """Replicas and image of the Deployment as it is now."""
    spec = present(cluster, NAMESPACE, "deployment kvplane-operator")["spec"]
    return spec["replicas"], spec["template"]["spec"]["containers"][0]["image"]


def uids(cluster: Cluster) -> dict[str, str]:
    """What an operation on the release must leave as it is: the CRD, the service, its children."""
    kept = (CRD, "llmservice chat", *CHILDREN)
    return {what: present(cluster, "default", what)["metadata"]["uid"] for what in kept}


def present(cluster: Cluster, namespace: str, what: str) -> Manifest:
    found = get(cluster, namespace, what)
    assert found is not None, what
    return found


def admitted_by_pod_security_restricted(cluster: Cluster, installation: Installation) -> None:
    """The namespace enforces it: the Deployment gets its pods, and the self-test's pod would be let in."""
    eventually(lambda: get_all(cluster, NAMESPACE, "pod"), what="pods of the operator")
    selftest = json.dumps(installation.rendered.one("Pod"))
    cluster.kubectl("create", "--dry-run=server", "-f", "-", stdin=selftest)
