"""The image of the process that holds a pod's namespaces, made from the pause.c that Kubernetes ships in its module."""

import json
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster import binaries
from e2e.cluster.containerd import ARCHITECTURES, UnpackedImage, digest, make_manifest, tar
from e2e.cluster.daemons import PAUSE_IMAGE
from e2e.cluster.errors import BuildError

SOURCE = "build/pause/linux/pause.c"


@dataclass(frozen=True)
class BuiltImage:
    """An image of one layer, in memory."""

    name: str
    config: bytes
    layer: bytes

    def archive(self) -> bytes:
        """An OCI archive."""
        layer = digest(self.layer)
        manifest = make_manifest(self.config, [(layer, len(self.layer))])
        return UnpackedImage((self.name,), manifest, self.config, ()).archive({layer: self.layer})


def image(module_cache: Path, *, name: str = PAUSE_IMAGE, labels: Mapping[str, str] | None = None) -> BuiltImage:
    """The image, under another name or with labels where a test wants several.

    Raises:
        BuildError: there is no C compiler, or pause.c does not compile.
    """
    (kubernetes,) = binaries.select(["kubernetes"])
    source = module_cache / f"k8s.io/kubernetes@{kubernetes.version()}" / SOURCE
    if not source.exists():
        binaries.download_source(kubernetes, "k8s.io/kubernetes")
    layer = tar({"pause": compile_static(source)}, mode=0o755)
    config = {
        "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {"Entrypoint": ["/pause"], "User": "65535:65535", "Labels": dict(labels or {})},
        "rootfs": {"type": "layers", "diff_ids": [digest(layer)]},
    }
    return BuiltImage(name, json.dumps(config).encode(), layer)


def compile_static(source: Path) -> bytes:
    """The program; static, as nothing else is in the image."""
    if not (compiler := shutil.which("gcc") or shutil.which("cc")):
        raise BuildError("There is no C compiler for the pause image: install gcc and libc6-dev.")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "pause")
        done = subprocess.run(
            [compiler, "-Os", "-static", "-DVERSION=kvplane", "-o", program, source],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise BuildError(f"{source} does not compile:\n{done.stderr.strip()}")
        return program.read_bytes()
