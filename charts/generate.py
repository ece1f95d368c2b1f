"""Writes what the chart and its reference derive from: ``python -m charts.generate``.

The schema of the values is the one place where a value, its meaning and its default are written down; values.yaml and
docs/chart.md are made from it. The CRD comes from kvplane_api, as crds/ does, the dashboards from charts.dashboards. A test
fails on a difference.
"""

import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from charts import dashboards
from kvplane_api import crd

REPOSITORY: Final = Path(__file__).resolve().parents[1]
CHART: Final = REPOSITORY / "charts" / "kvplane"
SCHEMA: Final = CHART / "values.schema.json"
DASHBOARDS: Final = CHART / "dashboards"
RULES: Final = CHART / "rules" / "kvplane.yaml"

_WIDTH: Final = 110
_HELM_OWN: Final = "global"
"""Allowed because Helm sets it in dependencies; users have no use for it."""

Schema = Mapping[str, Any]


def crd_template() -> str:
    """The CRD as a template: under templates/, so that upgrades update it, which Helm does not do with a crds/ folder."""
    definition = crd.custom_resource_definition()
    definition["metadata"]["annotations"] = {"helm.sh/resource-policy": "keep"}
    body = crd.to_yaml(definition).replace("{{", '{{ "{{" }}')
    return f"{crd.HEADER}{{{{- if .Values.crds.install }}}}\n{body}{{{{- end }}}}\n"


def values_yaml(schema: Schema) -> str:
    """The default values, each under its description."""
    head = "# Generated from values.schema.json by `make generate`. Do not edit. The same as a table: docs/chart.md\n"
    return head + "\n" + "\n".join(_block(name, part, indent=0) for name, part in _public(schema))


def reference(schema: Schema) -> str:
    """docs/chart.md."""
    rows = [f"| `{path}` | `{json.dumps(part['default'])}` | {_prose(part)} |" for path, part in leaves(schema)]
    return "\n".join([_REFERENCE_HEAD, "| value | default | meaning |", "|---|---|---|", *rows, "", _REFERENCE_TAIL])


def leaves(schema: Schema, prefix: str = "") -> Iterator[tuple[str, Schema]]:
    """Every value that has a default, by its path."""
    for name, part in _public(schema):
        if "default" in part:
            yield f"{prefix}{name}", part
        else:
            yield from leaves(part, f"{prefix}{name}.")


def outputs() -> dict[Path, str]:
    """Every generated file and its text."""
    schema = json.loads(SCHEMA.read_text())
    return {
        CHART / "templates" / "crd.yaml": crd_template(),
        CHART / "values.yaml": values_yaml(schema),
        REPOSITORY / "docs" / "chart.md": reference(schema),
        **dashboards.outputs(DASHBOARDS),
    }


def _public(schema: Schema) -> Iterator[tuple[str, Schema]]:
    return ((name, part) for name, part in schema["properties"].items() if name != _HELM_OWN)


def _block(name: str, part: Schema, *, indent: int) -> str:
    pad = "  " * indent
    comment = textwrap.fill(
        part["description"], _WIDTH, initial_indent=f"{pad}# ", subsequent_indent=f"{pad}# ", break_on_hyphens=False
    )
    if "default" not in part:
        inner = "".join(_block(child, schema, indent=indent + 1) for child, schema in _public(part))
        return f"{comment}\n{pad}{name}:\n{inner}"
    value = part["default"]
    if isinstance(value, dict | list) and value:
        return f"{comment}\n{pad}{name}:\n{crd.to_yaml(value, indent + 1)}"
    return f"{comment}\n{pad}{name}: {json.dumps(value)}\n"


def _prose(part: Schema) -> str:
    text = part["description"]
    if "enum" in part:
        text += " One of " + ", ".join(f"`{value}`" for value in part["enum"]) + "."
    if "minimum" in part:
        text += f" From {part['minimum']} to {part['maximum']}."
    return str(text)


_REFERENCE_HEAD: Final = """\
<!-- Generated from charts/kvplane/values.schema.json by `make generate`. Do not edit. -->
# The chart `charts/kvplane`

    helm install kvplane charts/kvplane --namespace kvplane-system --create-namespace --wait
    helm test kvplane --namespace kvplane-system

It installs the CRD of LLMService and the operator: a Deployment of two pods of which one leads, its ServiceAccount and
roles, a Service for health and metrics, a PodDisruptionBudget. Kubernetes 1.29 or newer; tested with Helm 4. Everything
meets the pod security standard `restricted`.

No image is published yet: push yours with `make images PUSH=REGISTRY/PATH`, and add
`--set image.repository=REGISTRY/PATH/control --set image.tag=dev`.

## Values

A value that is not listed here is refused.
"""

_REFERENCE_TAIL: Final = """\
## Rights

The operator gets exactly what it uses, cluster-wide or, with `watchNamespaces`, in those namespaces only; a test runs it
behind a recorder and compares. It reads no secrets, no pod logs, and executes nothing in pods. A namespace of `watchNamespaces`
that was deleted, and its Role with it, stops no other one: the operator leaves it out when it starts, says so in its log, and
restarts within a minute of being allowed to read it.

Who may write an LLMService can run any pod in its namespace, by `engine.image` and `podTemplate`, hostPath volumes included: grant
it like the right to write Deployments, and let the namespace's pod security bound it. The chart makes no role for people:
whoever is not an administrator needs the verbs on `llmservices` (API group `kvplane.dev`), and for `kubectl scale` get and patch
on `llmservices/scale`.

| resource | verbs | for |
|---|---|---|
| llmservices | list, watch | the services |
| llmservices/status | patch | their status |
| llmservices/finalizers | update | owner references that block deletion, where an admission plugin guards those; none is set |
| deployments, statefulsets, services, configmaps, poddisruptionbudgets | get, list, watch, create, patch, delete | the children |
| pods | list, watch, patch, delete | their state; configurations are synced, the emptiest go first, ranks are renewed |
| horizontalpodautoscalers | list | with `rbac.autoscalers`: who else scales an LLMService |
| events | create | what a person watching a service wants to see |
| leases (release namespace, the operator's own) | get, create, update | one leader |

With `rbac.nodes` also list and watch on nodes, by a ClusterRole in any case: it shows which nodes are lost.

## Upgrade, rollback, uninstall

- An upgrade updates the CRD and the operator. Engine pods stay as they are, sidecar included, until their LLMService changes,
  unless `rolloutOnUpgrade` is set. How to take one service to the new pods: [guide.md](guide.md#changing-a-running-service).
  `--reuse-values` would leave out the values that only the newer chart has:
  `helm upgrade kvplane charts/kvplane -n kvplane-system --reset-then-reuse-values --set image.tag=TAG`.
- Give each version's image a tag of its own: `make images TAG=TAG PUSH=REGISTRY/PATH`. A node that
  has an image `dev` does not pull another one of that name. Keep the old image in the registry for as long as services have not
  been taken to the new one: their pods, new ones too, name the sidecar that they began with.
- A rollback does the same backwards. The CRD goes back too: fields that only the newer one knows are dropped from
  LLMServices when they are next written.
- `helm uninstall` removes the operator and its rights. The CRD, the LLMServices and their pods stay and serve on; deleting
  an LLMService then still removes its children, because no finalizer waits for the operator. To remove everything:
  `kubectl delete crd llmservices.kvplane.dev`; the operator's Lease goes with the release's namespace.
- The CRD that was kept belongs to the release's name and namespace. To install under another name, add
  `--take-ownership`, or set `crds.install=false`. Two releases must not watch the same namespace: each elects a leader of its own,
  and both would write.
"""


def main() -> None:
    """Write every generated file."""
    for path, text in outputs().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
