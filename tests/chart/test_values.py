"""Every value has an effect, and a value that has none is refused."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from charts.generate import CHART, SCHEMA, leaves
from kvplane_operator.settings import OperatorSettings
from tests.chart.helm import NAMESPACE, Helm, Rendered, environment

DEFAULTS = {path: part["default"] for path, part in leaves(json.loads(SCHEMA.read_text()))}
PROMETHEUS_OPERATOR = "--api-versions=monitoring.coreos.com/v1"


def images(rendered: Rendered) -> set[str]:
    """Where our image stands: operator, self-test, and the sidecar of engine pods."""
    sidecar = environment(rendered.operator)["KVPLANE_OPERATOR_SIDECAR_IMAGE"]
    return {rendered.operator["image"], rendered.selftest["image"], sidecar}


def setting(name: str) -> Callable[[Rendered], Any]:
    """What the operator makes of the environment that the chart gives it."""

    def read(rendered: Rendered) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in environment(rendered.operator).items():
                patch.setenv(variable, value)
            return getattr(OperatorSettings(), name)

    return read


def both_pods(field: str) -> Callable[[Rendered], Any]:
    """A field of the operator's pods that the self-test's pod has too."""

    def read(rendered: Rendered) -> Any:
        operator, selftest = rendered.pod["spec"].get(field), rendered.one("Pod")["spec"].get(field)
        assert operator == selftest
        return operator

    return read


def monitors(*path: str | int) -> Callable[[Rendered], Any]:
    """What stands at that path in both PodMonitors."""

    def read(rendered: Rendered) -> Any:
        found = [_at(monitor, path) for monitor in rendered.of("PodMonitor")]
        assert len(found) == 2
        assert found[0] == found[1]
        return found[0]

    return read


def _at(manifest: Any, path: tuple[str | int, ...]) -> Any:
    for step in path:
        manifest = manifest[step]
    return manifest


def dashboards(*path: str) -> Callable[[Rendered], Any]:
    """What stands at that path in each ConfigMap of a dashboard."""
    return lambda rendered: {str(_at(configmap, path)) for configmap in rendered.of("ConfigMap")}


def runbooks(rendered: Rendered) -> set[str]:
    """Where the alerts point, without their names."""
    rules = rendered.one("PrometheusRule")["spec"]["groups"][0]["rules"]
    return {rule["annotations"]["runbook_url"].removesuffix(f"/{rule['alert']}") for rule in rules}


def role_namespaces(rendered: Rendered) -> dict[str, set[str]]:
    kinds = ("ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")
    return {kind: {r["metadata"].get("namespace", "") for r in rendered.of(kind)} for kind in kinds}


def account(rendered: Rendered) -> set[str]:
    """Whom the roles are bound to and the pods run as."""
    bindings = rendered.of("ClusterRoleBinding") + rendered.of("RoleBinding")
    subjects = {subject["name"] for binding in bindings for subject in binding["subjects"]}
    return subjects | {both_pods("serviceAccountName")(rendered)}


AFFINITY: dict[str, Any] = {
    "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}
}
TOLERATION = {"key": "gpu", "operator": "Exists"}

EFFECTS: tuple[tuple[str, object, Callable[[Rendered], Any], object], ...] = (
    ("image.repository", "me/control", images, {"me/control:0.1.0"}),
    ("image.tag", "next", images, {"kvplane/control:next"}),
    ("image.pullPolicy", "Always", lambda r: r.operator["imagePullPolicy"], "Always"),
    ("image.pullPolicy", "Always", lambda r: r.selftest["imagePullPolicy"], "Always"),
    ("imagePullSecrets", [{"name": "mine"}], both_pods("imagePullSecrets"), [{"name": "mine"}]),
    ("replicas", 3, lambda r: r.one("Deployment")["spec"]["replicas"], 3),
    ("replicas", 1, lambda r: r.of("PodDisruptionBudget"), []),
    ("watchNamespaces", ["a", "b"], setting("watch_namespaces"), ("a", "b")),
    (
        "watchNamespaces",
        ["a", "b"],
        role_namespaces,
        {
            "ClusterRole": set(),
            "ClusterRoleBinding": set(),
            "Role": {"a", "b", NAMESPACE},
            "RoleBinding": {"a", "b", NAMESPACE},
        },
    ),
    ("crds.install", False, lambda r: r.of("CustomResourceDefinition"), []),
    ("defaults.engineImage", "me/vllm:1", setting("engine_image"), "me/vllm:1"),
    ("defaults.ringImage", "me/ring:1", setting("ring_image"), "me/ring:1"),
    ("defaults.accelerator", "", setting("accelerator"), ""),
    ("defaults.imagePullPolicy", "Always", setting("image_pull_policy"), "Always"),
    ("rolloutOnUpgrade", True, setting("rollout_on_upgrade"), True),
    ("security.allowPathSources", True, setting("allow_path_sources"), True),
    ("rbac.autoscalers", False, setting("read_autoscalers"), False),
    ("rbac.nodes", True, setting("read_nodes"), True),
    ("logLevel", "DEBUG", setting("log_level"), "DEBUG"),
    ("metrics.podMonitor.enabled", True, lambda r: len(r.of("PodMonitor")), 2),
    ("metrics.podMonitor.labels", {"release": "p"}, monitors("metadata", "labels", "release"), "p"),
    ("metrics.podMonitor.interval", "15s", monitors("spec", "podMetricsEndpoints", 0, "interval"), "15s"),
    ("metrics.rules.enabled", True, lambda r: len(r.of("PrometheusRule")), 1),
    (
        "metrics.rules.labels",
        {"release": "p"},
        lambda r: r.one("PrometheusRule")["metadata"]["labels"]["release"],
        "p",
    ),
    ("metrics.rules.runbookUrl", "https://wiki.example.com/kv", runbooks, {"https://wiki.example.com/kv"}),
    ("dashboards.enabled", True, lambda r: len(r.of("ConfigMap")), 6),
    ("dashboards.labels", {"grafana": "yes"}, dashboards("metadata", "labels", "grafana"), {"yes"}),
    ("dashboards.annotations", {"folder": "LLM"}, dashboards("metadata", "annotations", "folder"), {"LLM"}),
    ("serviceAccount.create", False, lambda r: r.of("ServiceAccount"), []),
    ("serviceAccount.name", "me", account, {"me"}),
    (
        "serviceAccount.annotations",
        {"a": "b"},
        lambda r: r.one("ServiceAccount")["metadata"]["annotations"],
        {"a": "b"},
    ),
    ("resources.requests", {"cpu": 1}, lambda r: r.operator["resources"]["requests"]["cpu"], 1),
    ("resources.limits", {"memory": "1Gi"}, lambda r: r.operator["resources"]["limits"], {"memory": "1Gi"}),
    ("podDisruptionBudget.enabled", False, lambda r: r.of("PodDisruptionBudget"), []),
    ("podLabels", {"team": "a"}, lambda r: r.pod["metadata"]["labels"]["team"], "a"),
    (
        "podLabels",
        {"app.kubernetes.io/name": "taken"},
        lambda r: r.pod["metadata"]["labels"],
        {
            "app.kubernetes.io/name": "kvplane",
            "app.kubernetes.io/instance": "kvplane",
            "app.kubernetes.io/component": "operator",
        },
    ),
    ("podAnnotations", {"a": "b"}, lambda r: r.pod["metadata"]["annotations"], {"a": "b"}),
    ("nodeSelector", {"a": "b"}, both_pods("nodeSelector"), {"a": "b"}),
    ("tolerations", [TOLERATION], both_pods("tolerations"), [TOLERATION]),
    ("affinity", AFFINITY, lambda r: r.pod["spec"]["affinity"], AFFINITY),
    ("priorityClassName", "high", lambda r: r.pod["spec"]["priorityClassName"], "high"),
)

NEEDS: dict[str, dict[str, object]] = {
    "serviceAccount.create": {"serviceAccount.name": "theirs"},
    "metrics.podMonitor.labels": {"metrics.podMonitor.enabled": True},
    "metrics.podMonitor.interval": {"metrics.podMonitor.enabled": True},
    "metrics.rules.labels": {"metrics.rules.enabled": True},
    "metrics.rules.runbookUrl": {"metrics.rules.enabled": True},
    "dashboards.labels": {"dashboards.enabled": True},
    "dashboards.annotations": {"dashboards.enabled": True},
}
"""Values that act only together with others."""


@pytest.mark.parametrize(("path", "value", "read", "expected"), EFFECTS, ids=[f"{e[0]}={e[1]}" for e in EFFECTS])
def test_a_value_acts(helm: Helm, path: str, value: object, read: Callable[[Rendered], Any], expected: object) -> None:
    assert value != DEFAULTS[path]
    assert read(helm.render(PROMETHEUS_OPERATOR, values={**NEEDS.get(path, {}), path: value})) == expected


def test_every_value_is_tested() -> None:
    assert {effect[0] for effect in EFFECTS} == DEFAULTS.keys()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replica": 1}, "at '': additional properties 'replica' not allowed"),
        ({"crds.instal": True}, "at '/crds': additional properties 'instal' not allowed"),
        ({"replicas": 0}, "at '/replicas': minimum: got 0, want 1"),
        ({"replicas": "two"}, "at '/replicas': got string, want integer"),
        ({"image.tag": 1}, "at '/image/tag': got number, want string"),
        ({"image.repository": ""}, "at '/image/repository': minLength: got 0, want 1"),
        (
            {"image.pullPolicy": "Sometimes"},
            "'/image/pullPolicy': value must be one of 'Always', 'IfNotPresent', 'Never'",
        ),
        ({"logLevel": "info"}, "at '/logLevel': value must be one of 'DEBUG', 'INFO', 'WARNING', 'ERROR'"),
        ({"watchNamespaces": ["Team_A"]}, "at '/watchNamespaces/0': 'Team_A' does not match pattern"),
        ({"watchNamespaces": ["a", "a"]}, "at '/watchNamespaces': items at 0 and 1 are equal"),
        ({"defaults.accelerator": "gpu"}, "at '/defaults/accelerator': 'gpu' does not match pattern"),
        ({"imagePullSecrets": ["mine"]}, "at '/imagePullSecrets/0': got string, want object"),
        ({"metrics.podMonitor.interval": "often"}, "at '/metrics/podMonitor/interval': 'often' does not match pattern"),
        (
            {"metrics.rules.runbookUrl": "docs/runbooks/"},
            "at '/metrics/rules/runbookUrl': 'docs/runbooks/' does not match pattern",
        ),
        ({"resources.claims": []}, "at '/resources': additional properties 'claims' not allowed"),
        ({"serviceAccount.create": False}, "serviceAccount.name must name an existing ServiceAccount, because"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_bad_value_is_refused(helm: Helm, values: dict[str, object], message: str) -> None:
    done = helm.run("template", "kvplane", str(CHART), values=values)
    assert not done.succeeded
    assert message in done.stderr


def test_defaults_are_the_operators_own(helm: Helm) -> None:
    """The same installation, whether the operator is started by the chart or by hand."""
    ours = OperatorSettings.model_fields
    rendered = helm.render()
    for name in (
        "engine_image",
        "ring_image",
        "image_pull_policy",
        "accelerator",
        "allow_path_sources",
        "read_autoscalers",
        "read_nodes",
        "rollout_on_upgrade",
    ):
        assert setting(name)(rendered) == ours[name].default
    for name in ("log_level", "lease_name", "lease_namespace", "watch_namespaces"):
        assert setting(name)(rendered) == ours[name].default
