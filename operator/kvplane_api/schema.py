"""From pydantic models to a structural CRD schema.

The models in ``service.py`` are the only source; ``crds/`` and the chart's copy are generated from them. Kubernetes wants
a *structural* schema: no ``$ref``, no ``anyOf`` with null, no ``additionalProperties`` beside ``properties``, bounds on
everything that CEL iterates over. pydantic writes JSON Schema for humans and validators; the difference is what this
module does. It refuses, with the path, any construct it does not know, so that a model cannot lose a rule on the way.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

Schema = dict[str, Any]

_KEPT = (
    "type",
    "description",
    "enum",
    "format",
    "pattern",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "required",
)

PERSISTED_DEFAULT = "persisted-default"
"""Marks a field whose default the API server writes into the object. All others stay out of the object and are applied by
the reader, so that an object shows what its user wrote."""


class SchemaError(ValueError):
    """A model uses something that a structural schema cannot express; the message names the path."""


def structural_schema(model: type[BaseModel]) -> Schema:
    """The structural OpenAPI v3 schema of ``model``, with its ``x-kubernetes-*`` extensions."""
    raw = model.model_json_schema(by_alias=True, mode="validation")
    return _convert(raw, raw.get("$defs", {}), path=model.__name__)


def _convert(node: Mapping[str, Any], definitions: Mapping[str, Any], *, path: str) -> Schema:
    if node.get("x-kubernetes-int-or-string"):
        return {key: node[key] for key in ("description", "maxLength", "x-kubernetes-int-or-string") if key in node}
    node = _resolve(node, definitions, path=path)
    out: Schema = {key: node[key] for key in _KEPT if key in node}
    if "description" in out:
        out["description"] = " ".join(str(out["description"]).split())
    out.update({key: value for key, value in node.items() if key.startswith("x-kubernetes-")})
    if "const" in node:
        out["enum"] = [node["const"]]
    if node.get(PERSISTED_DEFAULT):
        out["default"] = node["default"]
    if "properties" in node:
        out["type"] = "object"
        out["properties"] = {
            name: _convert(child, definitions, path=f"{path}.{name}") for name, child in node["properties"].items()
        }
    elif isinstance(node.get("additionalProperties"), Mapping):
        out["additionalProperties"] = _convert(node["additionalProperties"], definitions, path=f"{path}[*]")
        _require(out, "maxProperties", path=path)
    if out.get("type") == "array":
        out["items"] = _convert(node["items"], definitions, path=f"{path}[]")
        _require(out, "maxItems", path=path)
    if out.get("type") == "string" and not {"maxLength", "enum", "format"} & out.keys():
        raise SchemaError(f"{path}: a string needs maxLength, an enum or a format, else CEL cannot bound its cost")
    if "type" not in out and not any(key.startswith("x-kubernetes-") for key in out):
        raise SchemaError(f"{path}: no type; a structural schema needs one")
    return out


def _require(schema: Schema, bound: str, *, path: str) -> None:
    if bound not in schema:
        raise SchemaError(f"{path}: {bound} is missing; every list and map in the API is bounded")


def _resolve(node: Mapping[str, Any], definitions: Mapping[str, Any], *, path: str) -> dict[str, Any]:
    """Follow references and drop ``null`` alternatives; what stands beside a reference wins over what it points to."""
    merged = dict(node)
    while "$ref" in merged or "anyOf" in merged:
        if "$ref" in merged:
            target = definitions[merged.pop("$ref").rsplit("/", 1)[-1]]
        else:
            alternatives = [a for a in merged.pop("anyOf") if a.get("type") != "null"]
            if len(alternatives) != 1:
                raise SchemaError(f"{path}: a union of several types is not structural; use x-kubernetes-int-or-string")
            target = alternatives[0]
        merged = {**target, **merged}
    return merged
