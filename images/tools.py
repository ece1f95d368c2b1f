"""How docker, podman and buildah spell the same five commands, and which of them this machine has.

docker needs its daemon and builds what `kind load` takes; podman and buildah need none. buildah is what the local
cluster uses: its store (`images.storage`) is where the cluster takes layers from, so there it is named outright.
"""

import enum
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from images.storage import Storage, buildah_environment

CERTIFICATES = Path("/etc/ssl/certs")
"""Mounted into builds by the tools that can: a site's own certificate authority must be believed there too."""


class Tool(enum.StrEnum):
    """A program that builds images."""

    DOCKER = "docker"
    PODMAN = "podman"
    BUILDAH = "buildah"


@dataclass(frozen=True)
class Commands:
    """The argument lists of one tool."""

    tool: Tool
    storage: Storage
    """Used by buildah only."""
    mount_certificates: bool
    plain_http: bool = False
    """Push without TLS, for a registry on this machine; docker decides that itself, by its daemon's configuration."""

    @property
    def prefix(self) -> str:
        """What comes before `control` in an image's name; docker takes `localhost/` for a registry, the others add it."""
        return "kvplane" if self.tool is Tool.DOCKER else "localhost/kvplane"

    def build(
        self,
        *,
        containerfile: str,
        context: str,
        arguments: Mapping[str, str],
        names: tuple[str, ...],
    ) -> tuple[str, ...]:
        """Build `containerfile` and call the result all of `names`."""
        options = [f"--build-arg={name}={value}" for name, value in sorted(arguments.items())]
        options += [f"--tag={name}" for name in names]
        if self.tool is not Tool.DOCKER:
            options.append("--layers")
            if self.mount_certificates:
                options.append(f"--volume={CERTIFICATES}:{CERTIFICATES}:ro")
        verb = "bud" if self.tool is Tool.BUILDAH else "build"
        return self._run(verb, *options, f"--file={containerfile}", context)

    def tag(self, image: str, name: str) -> tuple[str, ...]:
        """Call `image` also `name`."""
        return self._run("tag", image, name)

    def push(self, image: str, destination: str) -> tuple[tuple[str, ...], ...]:
        """Send `image` to the registry as `destination`; credentials are the tool's own (`docker login`)."""
        if self.tool is Tool.DOCKER:
            return self.tag(image, destination), self._run("push", destination)
        options = ("--tls-verify=false",) if self.plain_http else ()
        return (self._run("push", *options, image, f"docker://{destination}"),)

    def remove(self, images: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
        """Remove names, and images left without one. The build cache goes too where the store is ours alone."""
        remove = self._run("rmi", *images)
        return (remove, self._run("rmi", "--prune")) if self.tool is Tool.BUILDAH else (remove,)

    def remove_containers(self) -> tuple[str, ...] | None:
        """Remove what builds leave behind, a container and its mount each; None where there is none, or may be others' own.

        buildah 1.28 leaves one for each stage that only lends its files, and any build that is killed leaves its own.
        """
        listed = self.storage.containers_file
        if self.tool is not Tool.BUILDAH or not listed.exists() or not json.loads(listed.read_text()):
            return None
        return self._run("rm", "--all")

    def environment(self) -> dict[str, str]:
        """The environment to run these commands with."""
        if self.tool is not Tool.BUILDAH:
            return dict(os.environ)
        # Temporary files and the cache mounts of builds: beside the images, removed with them.
        return buildah_environment({**os.environ, "TMPDIR": str(self.storage.root.parent / "tmp")})

    def images(self) -> dict[str, str]:
        """The id of every named image, by name; empty where the store does not exist yet."""
        if self.tool is Tool.BUILDAH:  # reading the file takes a millisecond, starting buildah half a second
            if not self.storage.images_file.exists():
                return {}
            listed = json.loads(self.storage.images_file.read_text())
            return {name: image["id"] for image in listed for name in image.get("names", ())}
        command = self._run("images", "--no-trunc", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}")
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        pairs = (line.split() for line in output.splitlines())
        return {name: image for name, image in pairs if "<none>" not in name}

    def _run(self, *arguments: str) -> tuple[str, ...]:
        if self.tool is Tool.BUILDAH:
            return self.storage.buildah(*arguments)
        return (str(self.tool), *arguments)


def detect_tool() -> Tool:
    """docker where its daemon answers, else podman where installed, else buildah (installed when needed)."""
    if shutil.which("docker"):
        try:
            answer = subprocess.run(["docker", "info"], capture_output=True, timeout=20, check=False)
        except subprocess.TimeoutExpired:
            answer = None
        if answer is not None and answer.returncode == 0:
            return Tool.DOCKER
    return Tool.PODMAN if shutil.which("podman") else Tool.BUILDAH
