"""The image of the process that holds a pod's namespaces, made from the pause.c that Kubernetes ships in its module."""

import shutil
import subprocess
import tempfile
from pathlib import Path

from e2e.cluster import binaries
from e2e.cluster.containerd import Layer, UnpackedImage, digest, tar
from e2e.cluster.daemons import PAUSE_IMAGE
from e2e.cluster.errors import BuildError

SOURCE = "build/pause/linux/pause.c"


def archive(module_cache: Path) -> bytes:
    """An OCI archive of the image; Kubernetes must have been built with this module cache, or be downloadable.

    Raises:
        BuildError: there is no C compiler, or pause.c does not compile.
    """
    (kubernetes,) = binaries.select(["kubernetes"])
    source = module_cache / f"k8s.io/kubernetes@{kubernetes.version()}" / SOURCE
    layer = tar({"pause": compile_static(source)}, mode=0o755)
    config = (
        '{"architecture":"amd64","os":"linux","config":{"Entrypoint":["/pause"],"User":"65535:65535"},'
        f'"rootfs":{{"type":"layers","diff_ids":["{digest(layer)}"]}}}}'
    )
    image = UnpackedImage((PAUSE_IMAGE,), config.encode(), (Layer(digest(layer), len(layer), Path()),))
    return image.archive({digest(layer): layer})


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
