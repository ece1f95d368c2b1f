"""Events on an LLMService, as the API server takes them."""

import time
from datetime import UTC, datetime
from typing import Any, Final, Literal

from kvplane_api import names
from kvplane_operator.plan.snapshot import Snapshot

STAMP: Final = "%Y-%m-%dT%H:%M:%SZ"
"""Times as Kubernetes writes them."""

_LONGEST_MESSAGE: Final = 1024


def event_of(snapshot: Snapshot, kind: Literal["Normal", "Warning"], reason: str, message: str) -> dict[str, Any]:
    """An event about the service, of now; a message is cut where the API server would refuse it."""
    stamp = datetime.now(UTC).strftime(STAMP)
    return {
        "metadata": {"name": f"{snapshot.name}.{time.time_ns():x}", "namespace": snapshot.namespace},
        "involvedObject": {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "namespace": snapshot.namespace,
            "name": snapshot.name,
            "uid": snapshot.uid,
        },
        "type": kind,
        "reason": reason,
        "message": message[:_LONGEST_MESSAGE],
        "source": {"component": names.MANAGER},
        "reportingComponent": names.MANAGER,
        "firstTimestamp": stamp,
        "lastTimestamp": stamp,
        "count": 1,
    }
