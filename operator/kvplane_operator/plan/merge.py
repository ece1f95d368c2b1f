"""Kubernetes lists with keys: merging an overlay over a manifest, and finding where an observed object departs from it.

Both need to know which lists are maps by a key (containers by name, Service ports by port and protocol). The table covers
what the operator writes and what a pod template overlay commonly adds; a list that is not in it is one value. All of it
is JSON as it was parsed: maps are dicts.
"""

from collections.abc import Iterator
from typing import Any

from kvplane_operator.plan import quantities

_LIST_KEYS: dict[str, tuple[str, ...]] = {
    "containers": ("name",),
    "initContainers": ("name",),
    "ephemeralContainers": ("name",),
    "volumes": ("name",),
    "env": ("name",),
    "imagePullSecrets": ("name",),
    "volumeMounts": ("mountPath",),
    "volumeDevices": ("devicePath",),
    "ownerReferences": ("uid",),
    "hostAliases": ("ip",),
    "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
    # Whole items: a user's tolerations come beside the operator's own.
    "tolerations": ("key", "operator", "value", "effect"),
}
_PORT_KEYS = (("containerPort", "protocol"), ("port", "protocol"))

_QUANTITY_PARENTS = frozenset({"limits", "requests"})
_QUANTITY_FIELDS = frozenset({"sizeLimit"})


def overlay(base: Any, patch: Any, field: str = "") -> Any:
    """``base`` with ``patch`` merged over it: maps key by key, keyed lists item by item, anything else replaced.

    Items of a keyed list that only the patch has are appended, in its order.
    """
    if isinstance(base, dict) and isinstance(patch, dict):
        merged = dict(base)
        for key, value in patch.items():
            merged[key] = overlay(base[key], value, key) if key in base else value
        return merged
    if isinstance(base, list) and isinstance(patch, list) and (keys := _keys(field, base + patch)):
        by_key = {_key(item, keys): item for item in base}
        for item in patch:
            key = _key(item, keys)
            by_key[key] = overlay(by_key[key], item) if key in by_key else item
        return list(by_key.values())
    return patch


def departures(wanted: Any, observed: Any, path: str = "", field: str = "") -> Iterator[str]:
    """Paths at which ``observed`` does not have what ``wanted`` says; what only ``observed`` has (defaults, other
    writers' fields) does not count."""
    if wanted == observed:
        return  # most parts, and at once
    if isinstance(wanted, dict):
        if not isinstance(observed, dict):
            if wanted:  # the API server drops empty maps
                yield path
            return
        for key, value in wanted.items():
            yield from departures(value, observed.get(key), f"{path}.{key}", _field(field, key))
    elif isinstance(wanted, list):
        yield from _list_departures(wanted, observed, path, field)
    elif wanted is None:
        if observed is not None:
            yield path
    elif not _same(wanted, observed, field):
        yield path


def _list_departures(wanted: list[Any], observed: Any, path: str, field: str) -> Iterator[str]:
    if not isinstance(observed, list):
        if wanted:
            yield path
        return
    if keys := _keys(field, wanted):
        by_key = {_key(item, keys): item for item in observed if isinstance(item, dict)}
        for item in wanted:
            key = _key(item, keys)
            if key in by_key:
                yield from departures(item, by_key[key], f"{path}[{'/'.join(key)}]")
            else:
                yield f"{path}[{'/'.join(key)}]"
        return
    if len(wanted) != len(observed):
        yield path
        return
    for index, (left, right) in enumerate(zip(wanted, observed, strict=True)):
        yield from departures(left, right, f"{path}[{index}]")


def _same(wanted: object, observed: object, field: str) -> bool:
    # The API server drops empty strings and false where they are a field's zero value.
    dropped = observed is None and wanted in ("", False)
    return wanted == observed or dropped or (_is_quantity(field) and quantities.equal(wanted, observed))


def _field(parent: str, key: str) -> str:
    return "quantity" if parent in _QUANTITY_PARENTS else key


def _is_quantity(field: str) -> bool:
    return field == "quantity" or field in _QUANTITY_FIELDS


def _keys(field: str, items: list[Any]) -> tuple[str, ...] | None:
    if not items or not all(isinstance(item, dict) for item in items):
        return None
    if field in _LIST_KEYS:
        return _LIST_KEYS[field]
    if field == "ports":
        return next((keys for keys in _PORT_KEYS if all(keys[0] in item for item in items)), None)
    return None


def _key(item: dict[str, Any], keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(item.get(key, "TCP" if key == "protocol" else "")) for key in keys)
