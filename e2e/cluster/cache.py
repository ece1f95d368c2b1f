"""Where everything that may be thrown away lies: `$KVPLANE_CACHE`, by default ~/.cache/kvplane.

bin/NAME-KEY/   programs built from one Go module; KEY is the hash of what they are built from
go/             Go's module and build caches, and a Go toolchain where the system has none
images/         the golden image store that the nodes of every cluster share
preview/KEY/    the page that draws dashboards, with its npm packages (charts/preview)
clusters/NAME/  one running cluster: certificates, disks of its machines, logs, kubeconfig
"""

import os
from pathlib import Path


def root() -> Path:
    """The cache folder; it need not exist yet."""
    return Path(os.environ.get("KVPLANE_CACHE") or Path.home() / ".cache" / "kvplane").absolute()


def binaries() -> Path:
    return root() / "bin"


def go() -> Path:
    return root() / "go"


def golden() -> Path:
    return root() / "golden"


def clusters() -> Path:
    return root() / "clusters"
