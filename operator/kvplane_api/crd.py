"""Generates the CustomResourceDefinition: ``python -m kvplane_api.crd`` prints it.

``crds/llmservices.yaml`` and the chart's copy are this output; ``make verify`` and a test fail on a difference.
"""

import sys
from typing import Any

from kvplane_api import names
from kvplane_api.schema import structural_schema
from kvplane_api.service import LLMService

HEADER = "# Generated from operator/kvplane_api by `make generate`. Do not edit.\n"


def _ready(field: str) -> str:
    return f'.status.conditions[?(@.type=="Ready")].{field}'


PRINTER_COLUMNS: tuple[dict[str, Any], ...] = (
    {"name": "Mode", "type": "string", "jsonPath": ".status.mode", "description": "Paged or Ring"},
    {"name": "Ready", "type": "string", "jsonPath": _ready("status"), "description": "Serving, and as asked"},
    {
        "name": "Replicas",
        "type": "integer",
        "jsonPath": ".status.readyReplicas",
        "description": "Pods or rings that serve",
    },
    {
        "name": "Desired",
        "type": "integer",
        "jsonPath": ".status.desiredReplicas",
        "description": "Pods or rings asked for",
    },
    {"name": "Endpoint", "type": "string", "jsonPath": ".status.endpoint", "description": "Base URL in the cluster"},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
    {"name": "Model", "type": "string", "jsonPath": ".spec.model.source", "priority": 1},
    {
        "name": "KV-Used%",
        "type": "integer",
        "jsonPath": ".status.capacity.kvUsedPercent",
        "description": "Share of KV memory that running requests hold",
        "priority": 1,
    },
    {"name": "Reason", "type": "string", "jsonPath": _ready("reason"), "priority": 1},
)


def custom_resource_definition() -> dict[str, Any]:
    """The CRD as a plain object."""
    schema = structural_schema(LLMService)
    schema["properties"] = {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object"},
        **schema["properties"],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{names.PLURAL}.{names.GROUP}",
            "labels": {names.LABEL_APP_PART_OF: "kvplane"},
        },
        "spec": {
            "group": names.GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": names.KIND,
                "listKind": f"{names.KIND}List",
                "plural": names.PLURAL,
                "singular": names.SINGULAR,
                "shortNames": list(names.SHORT_NAMES),
                "categories": [names.CATEGORY],
            },
            "versions": [
                {
                    "name": names.VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": schema},
                    "subresources": {
                        "status": {},
                        "scale": {
                            "specReplicasPath": ".spec.replicas",
                            "statusReplicasPath": ".status.replicas",
                            "labelSelectorPath": ".status.selector",
                        },
                    },
                    "additionalPrinterColumns": [dict(column) for column in PRINTER_COLUMNS],
                }
            ],
        },
    }


def to_yaml(value: Any, indent: int = 0) -> str:
    """Block YAML of plain data, deterministic; strings are written as JSON strings, which YAML includes.

    The base install has no YAML library, and the output only has to be stable and readable.
    """
    import json  # noqa: PLC0415

    pad = "  " * indent
    if isinstance(value, dict) and value:
        return "".join(f"{pad}{_key(k)}:{_after(v, indent)}" for k, v in value.items())
    if isinstance(value, list) and value:
        return "".join(f"{pad}-{_item(v, indent)}" for v in value)
    return f"{pad}{json.dumps(value, ensure_ascii=False)}\n"


def _key(key: str) -> str:
    return f'"{key}"' if key.startswith("@") else key


def _after(value: Any, indent: int) -> str:
    if isinstance(value, dict | list) and value:
        return "\n" + to_yaml(value, indent + 1)
    return " " + to_yaml(value)


def _item(value: Any, indent: int) -> str:
    if isinstance(value, dict | list) and value:
        return " " + to_yaml(value, indent + 1).lstrip(" ")
    return " " + to_yaml(value)


def main() -> None:
    """Print the CRD."""
    sys.stdout.write(HEADER + to_yaml(custom_resource_definition()))


if __name__ == "__main__":
    main()
