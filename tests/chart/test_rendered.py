"""What the chart renders: accepted by recent Kubernetes versions, in step with the code, and nothing left from before."""

import re
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate.utils import all_versions, major_minor

from charts.generate import CHART, DASHBOARDS, REPOSITORY, RULES, outputs
from e2e.prometheus import SCRAPE_CONFIG
from kvplane_api import names
from kvplane_operator.plan.pods import selector
from kvplane_operator.settings import OperatorSettings
from tests.chart.helm import Helm, Manifest, Rendered, environment, rights

CI = sorted(CHART.glob("ci/*-values.yaml"))

PROMETHEUS_OPERATOR = "--api-versions=monitoring.coreos.com/v1"
NOT_KUBERNETES_OWN = {"PodMonitor", "PrometheusRule"}

VERSIONS = (
    "1.29",
    *sorted({major_minor(version) for version in all_versions()}, key=lambda v: int(v.split(".")[1]))[-2:],
)
"""The oldest that the chart admits, and the two newest."""

ci_values = pytest.mark.parametrize("values", CI, ids=lambda path: path.stem)


@pytest.mark.parametrize("path", outputs(), ids=lambda path: path.name)
def test_generated_files_are_up_to_date(path: Path) -> None:
    assert path.read_text() == outputs()[path], f"{path} is out of date: run `make generate`."


def test_the_chart_carries_the_projects_crd(helm: Helm) -> None:
    crd = helm.render().one("CustomResourceDefinition")
    assert crd["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert crd == yaml.safe_load((REPOSITORY / "crds" / "llmservices.yaml").read_text())


def test_the_versions_are_the_projects() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    assert (chart["version"], chart["appVersion"]) == (project, project)


def test_the_reference_lists_the_rights(helm: Helm) -> None:
    section = outputs()[REPOSITORY / "docs" / "chart.md"].partition("## Rights")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| ")
    ]
    listed = {
        (verb, resource)
        for row in rows[1:]
        for resource in row[0].split(" (")[0].split(", ")
        for verb in row[1].split(", ")
    }
    rendered = helm.render()
    roles = rendered.of("ClusterRole") + rendered.of("Role")
    assert listed == {(verb, resource) for role in roles for verb, _, resource in rights(role["rules"])}


@ci_values
def test_lint(helm: Helm, values: Path) -> None:
    helm.must("lint", "--strict", str(CHART), f"--values={values}")


@ci_values
def test_kubernetes_takes_the_objects(helm: Helm, values: Path) -> None:
    rendered = helm.render(PROMETHEUS_OPERATOR, f"--values={values}")
    for manifest in rendered.manifests:
        if manifest["kind"] not in NOT_KUBERNETES_OWN:
            for version in VERSIONS:
                kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize(("version", "installs"), [("1.28.9", False), ("1.29.0", True), ("1.29.0-gke.1", True)])
def test_kubernetes_is_new_enough(helm: Helm, version: str, installs: bool) -> None:
    done = helm.run("template", "kvplane", str(CHART), f"--kube-version={version}")
    assert done.succeeded == installs
    assert installs or "requires kubeVersion: >=1.29.0-0 which is incompatible with Kubernetes v1.28.9" in done.stderr


def test_the_environment_is_made_of_settings(helm: Helm) -> None:
    """A variable that is no setting would be ignored in silence."""
    rendered = helm.render()
    fields = {f"KVPLANE_OPERATOR_{name.upper()}" for name in OperatorSettings.model_fields}
    for container in (rendered.operator, rendered.selftest):
        assert environment(container).keys() <= fields
    assert environment(rendered.selftest).items() <= environment(rendered.operator).items()


def test_ports_and_probes_are_the_operators(helm: Helm) -> None:
    rendered = helm.render()
    ports = {"health": names.PORT_OPERATOR_HEALTH, "metrics": names.PORT_OPERATOR_METRICS}
    assert {port["name"]: port["containerPort"] for port in rendered.operator["ports"]} == ports
    service = rendered.one("Service")["spec"]
    assert {port["name"]: (port["port"], port["targetPort"]) for port in service["ports"]} == {
        name: (number, name) for name, number in ports.items()
    }
    probes = {kind: rendered.operator[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert {probe["port"] for probe in probes.values()} == {"health"}
    assert [probe["path"] for probe in probes.values()] == ["/livez", "/livez", "/readyz"]


def test_everything_selects_the_operators_pods(helm: Helm) -> None:
    rendered = helm.render(PROMETHEUS_OPERATOR, values={"metrics.podMonitor.enabled": True})
    labels = rendered.pod["metadata"]["labels"].items()
    assert rendered.one("Service")["spec"]["selector"].items() <= labels
    for kind, name in (("Deployment", ""), ("PodDisruptionBudget", ""), ("PodMonitor", "kvplane-operator")):
        assert rendered.one(kind, name=name)["spec"]["selector"]["matchLabels"].items() <= labels
    spread = rendered.pod["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"]
    assert spread.items() <= labels
    assert not rendered.one("Service")["spec"]["selector"].items() <= rendered.one("Pod")["metadata"]["labels"].items()


def test_the_selftest_asks_the_operators_service(helm: Helm) -> None:
    rendered = helm.render()
    service = rendered.one("Service")["metadata"]
    assert rendered.selftest["args"] == [f"--operator={service['name']}.{service['namespace']}.svc"]


@pytest.mark.parametrize("release", ["kvplane", "kv", "123", "kvplane-" + "x" * 45, "x" * 53])
def test_names_fit_for_any_release(helm: Helm, release: str) -> None:
    rendered = helm.render("--namespace=123", release=release, values={"watchNamespaces": ["456"]})
    for kind in ("Deployment", "Service", "Pod", "PodDisruptionBudget", "ServiceAccount"):
        name = rendered.one(kind)["metadata"]["name"]
        assert re.fullmatch("kvplane[a-z0-9-]{0,55}[a-z0-9]", name), name
    for manifest in rendered.manifests:
        metadata = manifest["metadata"]
        assert {type(text) for text in (metadata.get("namespace", ""), *metadata["labels"].values())} == {str}


def test_two_releases_share_nothing_but_the_crd(helm: Helm) -> None:
    def identities(rendered: Rendered) -> set[tuple[str, str, str]]:
        return {(m["kind"], m["metadata"].get("namespace", ""), m["metadata"]["name"]) for m in rendered.manifests}

    first, second = (identities(helm.render(release=name)) for name in ("one", "two"))
    assert first & second == {("CustomResourceDefinition", "", "llmservices.kvplane.dev")}


@pytest.mark.parametrize(("value", "kind"), [("podMonitor", "PodMonitor"), ("rules", "PrometheusRule")])
def test_monitoring_needs_its_crds(helm: Helm, value: str, kind: str) -> None:
    wanted = {f"metrics.{value}.enabled": True}
    assert helm.render(values=wanted).of(kind) == []
    assert len(helm.render(PROMETHEUS_OPERATOR, values=wanted).of(kind)) > 0
    notes = helm.must("install", "kvplane", str(CHART), "--dry-run=client", values=wanted)
    assert "this cluster has no PodMonitor and no PrometheusRule" in notes


def engine_monitor(helm: Helm, **values: object) -> Manifest:
    rendered = helm.render(PROMETHEUS_OPERATOR, values={"metrics.podMonitor.enabled": True, **values})
    return rendered.one("PodMonitor", name="kvplane-engines")


def test_the_engines_monitor_finds_the_sidecars(helm: Helm) -> None:
    spec = engine_monitor(helm)["spec"]
    (expression,) = spec["selector"]["matchExpressions"]
    assert expression["operator"] == "Exists"
    assert expression["key"] in selector("chat")
    assert spec["podMetricsEndpoints"][0]["port"] == "admin"


@pytest.mark.parametrize(("watched", "where"), [([], {"any": True}), (["a", "b"], {"matchNames": ["a", "b"]})])
def test_engines_are_monitored_where_services_are_served(
    helm: Helm, watched: list[str], where: dict[str, object]
) -> None:
    assert engine_monitor(helm, watchNamespaces=watched)["spec"]["namespaceSelector"] == where


def test_pod_monitors_say_what_a_plain_prometheus_is_told(helm: Helm) -> None:
    """docs/prometheus-scrape.yaml: the same ports, and the same labels beside those that every PodMonitor gives."""
    rendered = helm.render(PROMETHEUS_OPERATOR, values={"metrics.podMonitor.enabled": True})
    jobs = {job["job_name"]: job for job in yaml.safe_load(SCRAPE_CONFIG.read_text())["scrape_configs"]}
    for name in ("kvplane-engines", "kvplane-operator"):
        (endpoint,) = rendered.one("PodMonitor", name=name)["spec"]["podMetricsEndpoints"]
        relabelings, job = jobs[name]["relabel_configs"], jobs[name]
        assert [r["regex"] for r in relabelings if r.get("action") == "keep"] == [endpoint["port"]]
        assert job.get("honor_labels", False) == endpoint.get("honorLabels", False)
        given = {r["target_label"]: r["source_labels"] for r in relabelings if "target_label" in r}
        del given["namespace"], given["pod"]
        assert given == {r["targetLabel"]: r["sourceLabels"] for r in endpoint.get("relabelings", ())}


def test_the_chart_carries_the_projects_alerts(helm: Helm) -> None:
    rule = helm.render(PROMETHEUS_OPERATOR, values={"metrics.rules.enabled": True}).one("PrometheusRule")
    assert rule["spec"] == yaml.safe_load(RULES.read_text())


def test_the_chart_carries_the_projects_dashboards(helm: Helm) -> None:
    configmaps = helm.render(values={"dashboards.enabled": True}).of("ConfigMap")
    carried = {name: text for configmap in configmaps for name, text in configmap["data"].items()}
    assert carried == {path.name: path.read_text().rstrip("\n") for path in DASHBOARDS.glob("*.json")}
    assert {configmap["metadata"]["labels"]["grafana_dashboard"] for configmap in configmaps} == {"1"}


def test_as_a_dependency(helm: Helm, tmp_path: Path) -> None:
    """Helm hands `global` to dependencies, which a strict schema must not trip over."""
    umbrella = tmp_path / "umbrella"
    (umbrella / "charts").mkdir(parents=True)
    (umbrella / "charts" / "kvplane").symlink_to(CHART)
    (umbrella / "Chart.yaml").write_text("apiVersion: v2\nname: umbrella\nversion: 1.0.0\n")
    (umbrella / "values.yaml").write_text("global: {team: serving}\nkvplane: {replicas: 1}\n")
    assert helm.render(chart=umbrella).one("Deployment")["spec"]["replicas"] == 1


@pytest.mark.parametrize(("namespaces", "namespace"), [([], "default"), (["team-a", "team-b"], "team-a")])
def test_the_notes_tell_the_next_command(helm: Helm, namespaces: list[str], namespace: str) -> None:
    notes = helm.must("install", "kvplane", str(CHART), "--dry-run=client", values={"watchNamespaces": namespaces})
    notes = notes[notes.index("NOTES:") :]
    sample = notes[notes.index("  apiVersion") : notes.index("  EOF")]
    assert yaml.safe_load(sample)["kind"] == names.KIND
    assert f"kubectl apply -n {namespace} -f -" in notes
    assert f"kubectl get llms -n {namespace} --watch" in notes
