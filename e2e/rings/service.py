"""A ring service as the tests and bench/ring_recovery run it: the demo's model on small CPU rings.

A rank has room for so little that the prompts that are asked here fit none alone, while a ring with a rank less still holds
them: what is lost is computed again, and nothing has to wait for room. The engine's own settings have no field in
LLMService; they come by podTemplate, as a user would give them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from kvplane_api import names

KV_TOKENS: Final = 1200
"""Of each rank."""
MODEL_TOKENS: Final = 4096
"""The demo model's longest text."""
SIZE: Final = 3
SETTINGS: Final = {
    "KVPLANE_RING_KV_TOKENS": str(KV_TOKENS),
    # Every prompt is cut; by default those below some thousand tokens lie whole on one rank.
    "KVPLANE_RING_SHORT_TOKENS": "0",
    # Ranks share the machine's processors: more threads than these only take turns.
    "KVPLANE_RING_THREADS": "1",
}
"""Of the ring engine."""


def ring_service(
    name: str,
    namespace: str,
    source: str,
    *,
    size: int = SIZE,
    groups: int = 1,
    env: Sequence[Mapping[str, Any]] = (),
    recovery: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """An LLMService in mode Ring, each rank of a group on a node of its own. ``env``: more variables of the engine."""
    settings = [*({"name": variable, "value": value} for variable, value in SETTINGS.items()), *map(dict, env)]
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "model": {"source": source},
            "mode": "Ring",
            "replicas": groups,
            "engine": {"dtype": "float32", "env": [{"name": "OMP_NUM_THREADS", "value": "1"}]},
            # What busy processors can keep; with a GPU's defaults admission would turn requests away.
            "slo": {"ttftMilliseconds": 60_000, "tpotMilliseconds": 2000},
            "ring": {
                "size": size,
                "spread": "Required",
                "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"memory": "4Gi"}},
                "recovery": {"reformGraceSeconds": 5, **(recovery or {})},
            },
            "disruption": {"drainSeconds": 20},
            "podTemplate": {"spec": {"containers": [{"name": names.CONTAINER_ENGINE, "env": settings}]}},
        },
    }
