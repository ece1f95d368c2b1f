"""The golden store: an image is unpacked once on this host, and every node of every cluster shows the same files.

A kubelet's containerd cannot serve several nodes, but its root folder can be prepared. The golden store is such a root
that no kubelet uses. A node starts with a copy of its two small databases, hard links of its blobs, and read-only bind
mounts of its unpacked layers: well under a megabyte and a few milliseconds per node, whatever the size of the images, and
one page cache for all. Nodes that run already get new layers in the same way, mounted from outside.

Nothing that a cluster may have mounted is ever removed: the store is garbage-collected only while no cluster exists.
"""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster import buildah, cache, pause
from e2e.cluster.api import wait_for
from e2e.cluster.containerd import SNAPSHOTS, Store, UnpackedImage
from e2e.cluster.daemons import PAUSE_IMAGE
from e2e.cluster.progress import Progress
from images.storage import default_storage

DATABASES = ("io.containerd.metadata.v1.bolt/meta.db", "io.containerd.snapshotter.v1.overlayfs/metadata.db")
BLOBS = "io.containerd.content.v1.content/blobs/sha256"
RUN = Path("/run")

Image = UnpackedImage | Path
"""An image to load: one whose layers are unpacked, or an archive."""


def find(name: str) -> Image:
    """What `name` means: a docker- or OCI-archive where there is such a file, else an image of buildah's.

    Raises:
        ClusterStateError: there is neither.
    """
    return Path(name).absolute() if Path(name).is_file() else buildah.image(default_storage(), name)


@dataclass(frozen=True)
class GoldenStore:
    """The store in `folder`."""

    folder: Path
    programs: Mapping[str, Path]
    """Those of binaries.build()."""
    clusters: Path
    """Folder with the clusters that may show the store."""

    @property
    def root(self) -> Path:
        return self.folder / "root"

    def load(self, names: Iterable[str], progress: Progress) -> list[UnpackedImage]:
        """Take these images in, and the pause image once; the images as they are here, for nodes that run.

        Raises:
            ClusterStateError: there is no such image.
            CommandError: an archive cannot be imported.
        """
        wanted, loaded = [(name, find(name)) for name in names], []
        with self._lock(fcntl.LOCK_EX), self._containerd() as store:
            if PAUSE_IMAGE not in store.images():
                with progress.step("pause image"), tempfile.NamedTemporaryFile(suffix=".tar") as archive:
                    archive.write(pause.image(cache.go() / "mod").archive())
                    archive.flush()
                    store.import_archive(Path(archive.name))
            for name, image in wanted:
                with progress.step(f"image {name}") as step:
                    if isinstance(image, Path):
                        names_here = store.import_archive(image)
                    else:
                        names_here = image.names
                        step.detail = "" if store.adopt(image, store.link) else "is there already"
                    loaded += [store.unpacked(here) for here in names_here]
            if not self._is_shown():
                store.command("content", "prune", "references")
        return loaded

    def ensure_pause_image(self, progress: Progress) -> None:
        """Make the store usable for a first `up`, at no cost later."""
        done = self.folder / "pause-image"
        if not done.exists():
            self.load((), progress)
            done.touch()

    def seed(self, node_root: Path) -> tuple[str, ...]:
        """Prepare the containerd root of a node; the result are the numbers of the snapshots to mount there."""
        with self._lock(fcntl.LOCK_SH):
            for database in DATABASES:
                (node_root / database).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.root / database, node_root / database)
            (node_root / BLOBS).mkdir(parents=True)
            for blob in (self.root / BLOBS).iterdir():
                os.link(blob, node_root / BLOBS / blob.name)
            snapshots = sorted(snapshot.name for snapshot in (self.root / SNAPSHOTS).iterdir())
            for snapshot in snapshots:
                (node_root / SNAPSHOTS / snapshot).mkdir(parents=True)
        return tuple(snapshots)

    @contextmanager
    def _lock(self, kind: int) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, kind)
            yield

    def _is_shown(self) -> bool:
        """Whether there is a cluster; asked under the lock, as clusters write themselves down before they look."""
        return any(self.clusters.glob("*/cluster.json"))

    @contextmanager
    def _containerd(self) -> Iterator[Store]:
        """A containerd on the store, for as long as the lock is held; it dies with this process."""
        state = RUN / f"kvplane-golden-{self.folder.stat().st_ino}"  # short: a socket's path has at most 107 bytes
        shutil.rmtree(state, ignore_errors=True)
        state.mkdir()
        config, log_file = self.folder / "containerd.toml", self.folder / "containerd.log"
        config.write_text(golden_config(self.root, state, collect=not self._is_shown()))
        try:
            with (
                log_file.open("wb") as log,
                subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", "--", self.programs["containerd"], "--config", config],
                    stdout=log,
                    stderr=log,
                ) as daemon,
            ):
                try:
                    socket = state / "containerd.sock"
                    wait_for("The golden store's containerd", socket.exists, seconds=30, where=str(log_file))
                    yield Store(ctr=self.programs["ctr"], socket=socket, root=self.root)
                finally:
                    daemon.terminate()
        finally:
            shutil.rmtree(state, ignore_errors=True)


def golden_config(root: Path, state: Path, *, collect: bool) -> str:
    """No CRI, as no kubelet asks; without `collect` the garbage collector never gets to run."""
    schedule = "" if collect else '  startup_delay = "1000h"\n  mutation_threshold = 1000000000\n'
    return f"""\
version = 3
root = "{root}"
state = "{state}"
disabled_plugins = ["io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri"]
[grpc]
  address = "{state}/containerd.sock"
[plugins."io.containerd.gc.v1.scheduler"]
{schedule}"""
