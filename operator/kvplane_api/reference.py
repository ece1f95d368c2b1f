"""Writes the API reference: ``python -m kvplane_api.reference docs/reference``.

``llmservice.md`` is the CRD as a page, ``conditions.md`` the table of conditions, reasons and cures. Both derive from the
models and constants of this package alone; a test fails on a difference.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvplane_api import names
from kvplane_api.conditions import MEANINGS, Meaning, Type
from kvplane_api.crd import custom_resource_definition

_HEADER = "<!-- Generated from operator/kvplane_api by `make generate`. Do not edit. -->\n"

_TYPES = {
    Type.ACCEPTED: "The spec is valid and feasible.",
    Type.AVAILABLE: "At least one replica serves.",
    Type.PROGRESSING: "A rollout or a change of scale is under way.",
    Type.DEGRADED: "The service serves, but less than asked.",
    Type.SIGNALS_FRESH: "Every signal that admission and scaling need is there, of these very pods, and fresh.",
    Type.SCALING_ACTIVE: "The autoscaler decides on the replicas, both ways. It does not count for Ready.",
    Type.READY: "The roll-up of Accepted, Available and Degraded, and of a rollout that cannot go on: serving, and as asked. "
    "Its reason and message are theirs.",
}


def pages() -> dict[str, str]:
    """The pages by file name."""
    return {"llmservice.md": service_page(), "conditions.md": conditions_page()}


def service_page() -> str:
    """Every field of the resource: type, bounds, default, meaning, and the rules between fields."""
    schema = custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    lines = [
        _HEADER,
        f"# {names.KIND} ({names.API_VERSION})",
        "",
        f"{schema['description']} Short name: `{names.SHORT_NAMES[0]}`. The same text is in "
        f"`kubectl explain {names.SINGULAR}.spec --recursive`.",
        "",
        *_rules(schema),
    ]
    for part in ("spec", "status"):
        lines += [f"## {part}", "", "| field | type | meaning |", "|---|---|---|"]
        lines += [_row(path, node, required=required) for path, node, required in _fields(schema["properties"][part])]
        lines += [""]
        own = schema["properties"][part]
        if rules := _messages(own) + [rule for _, node, _ in _fields(own) for rule in _messages(node)]:
            lines += ["Refused at apply, with these messages:", "", *(f"- {rule}" for rule in dict.fromkeys(rules)), ""]
    return "\n".join(lines)


def conditions_page() -> str:
    """Condition types, and for each its reasons with what to do."""
    lines = [
        _HEADER,
        "# Conditions",
        "",
        "`kubectl describe llms NAME` shows them. Reasons are part of the API: alerts may use them. Messages are for people and "
        "change.",
        "",
    ]
    for kind in Type:
        lines += [
            f"## {kind.value}",
            "",
            _TYPES[kind],
            "",
            "| status | reason | it says | what to do |",
            "|---|---|---|---|",
        ]
        lines += [_meaning(meaning) for meaning in MEANINGS if meaning.type is kind]
        lines += [""]
    return "\n".join(lines)


def _meaning(meaning: Meaning) -> str:
    return f"| {meaning.status} | `{meaning.reason.value}` | {_cell(meaning.says)} | {_cell(meaning.cure)} |"


def _fields(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Path, schema and whether it is required, of every field below ``schema`` in reading order."""
    for name, node in schema.get("properties", {}).items():
        here = f"{path}.{name}" if path else name
        yield here, node, name in schema.get("required", ())
        if node.get("x-kubernetes-preserve-unknown-fields"):
            continue
        yield from _fields(node, here)
        yield from _fields(node.get("items", {}), f"{here}[]")


def _row(path: str, node: dict[str, Any], *, required: bool) -> str:
    meaning = node["description"] + (" Required." if required and "Required." not in node["description"] else "")
    return f"| `{path}` | {_cell(_type(node))} | {_cell(meaning)} |"


def _type(node: dict[str, Any]) -> str:
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    kind = str(node.get("type", "integer or string"))
    if kind == "array":
        return f"list of {node['items'].get('type', 'values')}, at most {node['maxItems']}"
    if "additionalProperties" in node:
        return f"map, at most {node['maxProperties']}"
    low, high = node.get("minimum"), node.get("maximum")
    if low is not None:
        return f"{kind}, {low} to {high}" if high is not None else f"{kind}, at least {low}"
    return f"{kind}, at most {node['maxLength']} characters" if "maxLength" in node else kind


def _messages(node: dict[str, Any]) -> list[str]:
    inner = [node, *(node.get(key, {}) for key in ("items", "additionalProperties"))]
    return [rule["message"] for part in inner for rule in part.get("x-kubernetes-validations", ())]


def _rules(schema: dict[str, Any]) -> list[str]:
    return [f"- {message}" for message in _messages(schema)] + [""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    """Write the pages into the folder given."""
    if len(sys.argv) != 2:
        raise SystemExit("Usage: python -m kvplane_api.reference FOLDER")
    for name, text in pages().items():
        (Path(sys.argv[1]) / name).write_text(text)


if __name__ == "__main__":
    main()
