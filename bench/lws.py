"""LeaderWorkerSet from its Go module, for the benchmarks that measure it beside ours."""

import json
import subprocess
from pathlib import Path
from typing import Final

from e2e.cluster import binaries, toolchain
from e2e.cluster.progress import Progress

_MODULE: Final = "sigs.k8s.io/lws"
_PROGRAM: Final = "lws-manager"
_COMPONENT: Final = binaries.Component(
    name="lws",
    module=Path(__file__).resolve().parent / "operator" / "modules" / "lws",
    programs={_PROGRAM: f"{_MODULE}/cmd"},
    versioned_by=_MODULE,
)
NAME: Final = f"LeaderWorkerSet-{_COMPONENT.version()}"
CRDS: Final = "config/crd/bases"
"""In its sources."""
WEBHOOKS: Final = "config/webhook/manifests.yaml"


def program(progress: Progress) -> Path:
    """Its controller manager; built where it is not in the cache."""
    return binaries.build([_COMPONENT], progress=progress)[_PROGRAM]


def sources() -> Path:
    """The module's source in Go's module cache, where its CRDs lie."""
    go = toolchain.find(toolchain.required_version((_COMPONENT.module / "go.mod").read_text()), Progress())
    answer = subprocess.run(
        [go.go, "mod", "download", "-json", f"{_MODULE}@{_COMPONENT.version()}"],
        cwd=_COMPONENT.module,
        env=go.environment(),
        capture_output=True,
        check=True,
    )
    return Path(json.loads(answer.stdout)["Dir"])
