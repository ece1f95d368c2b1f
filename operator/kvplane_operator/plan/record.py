"""What keeps an operator upgrade from rolling pods: the rendered template is recorded, and kept until the spec changes.

The record lives in the service's ConfigMap beside the sidecar's configuration (under a key that is not mounted) and holds
the template and a key: a hash of the parts of the spec that feed it. Same key: the recorded template stands, whatever a
newer operator would render. Each mode has a record of its own. See docs/decisions/0004-recorded-template.md.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from kvplane_api.service import LLMServiceSpec

DATA_KEY: Final = "pod-template.json"
RING_DATA_KEY: Final = "ring-pod-template.json"

_NOT_IN_TEMPLATE = ("replicas", "autoscaling", "rollout", "slo", "admission", "mode")
"""Parts of the spec that reach the pods by another way, or not at all."""


_RECOVERY_IN_TEMPLATE = ("reform_grace_seconds", "reserve")


@dataclass(frozen=True)
class Record:
    """A rendered pod template and the hash of what it was rendered from."""

    key: str
    template: dict[str, Any]
    text: str
    """The record as it stands in the ConfigMap."""


def digest(value: object) -> str:
    """Short stable hash of plain data."""
    text = json.dumps(value, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def template_key(
    spec: LLMServiceSpec, *, service: str, ring: int | None = None, extra: Mapping[str, object] | None = None
) -> str:
    """Hash of what the template of ``service`` depends on; ``extra`` adds the operator's own part, where it counts.

    ``ring`` is the size of its rings, asked for or planned; None where it has none, and then ``spec.ring`` counts for
    nothing.
    """
    parts = spec.model_dump(mode="json", exclude=set(_NOT_IN_TEMPLATE), exclude_unset=True)
    parts.get("model", {}).pop("facts", None)
    if "disruption" in parts:
        parts["disruption"].pop("pdb", None)
    if "context" in parts:
        parts["context"].pop("ring_threshold_tokens", None)
    rings = parts.pop("ring", None) or {}
    parts = {name: part for name, part in parts.items() if part != {}}
    if ring is None:
        return digest({"service": service, "spec": parts, "extra": extra or {}})
    recovery = rings.pop("recovery", {})
    shown = {name: recovery[name] for name in _RECOVERY_IN_TEMPLATE if name in recovery}
    return digest({"service": service, "spec": parts, "ring": {**rings, **shown, "size": ring}, "extra": extra or {}})


def make(key: str, template: dict[str, Any]) -> Record:
    """The record of a template that was just rendered."""
    parts = {"key": key, "digest": digest(template), "template": template}
    return Record(key, template, json.dumps(parts, separators=(",", ":"), sort_keys=True))


def load(data: Mapping[str, str], key: str) -> Record | None:
    """The record under that key of a ConfigMap's data; None where there is none or it was changed by hand."""
    try:
        text = data[key]
        raw = json.loads(text)
        record = Record(key=raw["key"], template=raw["template"], text=text)
        return record if raw["digest"] == digest(record.template) else None
    except (KeyError, TypeError, ValueError):
        return None
