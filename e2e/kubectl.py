"""Objects as kubectl finds them."""

import json
from collections.abc import Callable
from typing import Any


def get(kubectl: Callable[..., str], namespace: str, *what: str) -> Any:
    """``what``: a kind and a name, for that object or None; or a kind and options, for all that there are, often none."""
    text = kubectl("get", "-n", namespace, *what, "-o", "json", "--ignore-not-found")
    if not text.strip():  # also of a list without items
        named = len(what) > 1 and not what[1].startswith("-")
        return None if named else []
    found = json.loads(text)
    return found["items"] if found["kind"].endswith("List") else found
