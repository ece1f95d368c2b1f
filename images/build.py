"""Bring kvplane's images up to date: `python -m images.build [control] [engine-cpu] [demo-model] [ring-cpu]`.

A second run without changes does nothing and takes a fraction of a second; a change of kvplane's code rebuilds one small
layer. Each image gets the tag asked for (`dev`) and one that is the hash of its sources. The output of each step goes to
a log below kvplane's cache, and its end to the terminal where the step fails.
"""

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from e2e.cluster.progress import Progress
from images.plan import Plan, Request, Step, make_plan
from images.recipes import RECIPES
from images.storage import default_storage
from images.tools import CERTIFICATES, Commands, Tool, detect_tool

REPOSITORY = Path(__file__).resolve().parent.parent
PUBLIC_BASE = "docker.io/library/python:3.11-slim-bookworm"
"""The base where an image registry can be reached; with docker and podman the default."""
OUTPUT_LINES_SHOWN = 30


class ImageBuildError(Exception):
    """The images could not be built; the message says why and what to do, in whole sentences."""


def build_images(
    names: tuple[str, ...],
    *,
    tool: Tool | None = None,
    tag: str = "dev",
    base: str | None = None,
    push: str | None = None,
    plain_http: bool = False,
    prune: bool = False,
    progress: Progress | None = None,
) -> tuple[str, ...]:
    """Build what is out of date and return the full names of `names`.

    `tool` None detects one. `base` is an image reference, `debian` for the base made with debootstrap, or None:
    `debian` for buildah, the official Python image for docker and podman. Raises ImageBuildError.
    """
    progress = progress or Progress()
    tool = tool or detect_tool()
    if base is None:
        base = "debian" if tool is Tool.BUILDAH else PUBLIC_BASE
    storage = default_storage()
    commands = Commands(tool=tool, storage=storage, mount_certificates=CERTIFICATES.is_dir(), plain_http=plain_http)
    request = Request(names=names, tag=tag, base=None if base == "debian" else base, push=push, prune=prune)
    folder = storage.root.parent
    with _only_one(folder / "build.lock", progress):
        have = commands.images()
        plan = make_plan(request, repository=REPOSITORY, scratch=folder / "base", commands=commands, have=have)
        _require_programs(plan, progress)
        for part in ("base", "logs", "tmp"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        for log in {folder / "logs" / f"{step.image}.log" for step in plan.steps}:
            log.unlink(missing_ok=True)
        try:
            for step in plan.steps:
                _execute(step, folder / "logs" / f"{step.image}.log", commands.environment(), progress)
        finally:
            _remove_containers(commands)
    return plan.images


@contextmanager
def _only_one(lock: Path, progress: Progress) -> Iterator[None]:
    """Hold `lock`: two builds at once would make the same layers twice."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with progress.step("waiting for another build of the images"):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_containers(commands: Commands) -> None:
    """What this build left behind, or one before that was killed: nobody else builds now, so none of it is in use."""
    command = commands.remove_containers()
    if command is not None:
        subprocess.run(command, capture_output=True, check=False, env=commands.environment())


def _require_programs(plan: Plan, progress: Progress) -> None:
    """Install the Debian packages of missing programs where that is possible; else say what is missing."""
    programs = sorted({step.command[0] for step in plan.steps})
    missing = [program for program in programs if shutil.which(program) is None]
    root = os.geteuid() == 0
    if not root and {"buildah", "debootstrap"} & set(programs):
        raise ImageBuildError(
            "Building with buildah and debootstrap needs root. Run this as root, or start Docker and use --tool docker."
        )
    if not missing:
        return
    wanted = " ".join(missing)  # each of the programs is in the package of its own name
    if shutil.which("apt-get") is None or set(missing) - {"buildah", "debootstrap"}:
        raise ImageBuildError(
            f"Building the images needs {wanted}, not found on PATH. Install it, or use --tool docker|podman|buildah."
        )
    with progress.step(f"installing the Debian packages {wanted}"):
        for command in (
            ("apt-get", "update", "-qq"),
            ("apt-get", "install", "-qq", "--no-install-recommends", *missing),
        ):
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            )
        if done.returncode:
            raise ImageBuildError(f"apt-get could not install {wanted}; install it by hand. It said:\n{done.stdout}")


def _execute(step: Step, log: Path, environment: dict[str, str], progress: Progress) -> None:
    """Run one command into its log; on failure raise with the end of the output."""
    tail: deque[str] = deque(maxlen=OUTPUT_LINES_SHOWN)
    with progress.step(step.title) as shown, log.open("a") as file:
        with subprocess.Popen(
            step.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
        ) as process:
            for line in process.stdout or ():
                file.write(line)
                tail.append(line.rstrip())
                if " STEP " in line or line.startswith(("STEP ", "#", "I: ")):
                    shown.detail = line.strip()[:60]
        if process.returncode:
            output = "\n".join(tail)
            raise ImageBuildError(
                f"{step.title} failed: {step.command[0]} ended with status {process.returncode}. All of it is in {log}; "
                f"the end:\n{output}"
            )
        shown.detail = ""


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m images.build",
        description="Build kvplane's images where their sources changed.",
    )
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE", help=f"of {', '.join(RECIPES)} (default: control engine-cpu)"
    )
    parser.add_argument(
        "--tool", type=Tool, choices=list(Tool), help="default: docker or podman if usable, else buildah"
    )
    parser.add_argument("--tag", default="dev", help="tag of the images (default: dev)")
    parser.add_argument("--base", help=f"image to stand on, or debian to make one (default: debian or {PUBLIC_BASE})")
    parser.add_argument("--push", metavar="REGISTRY/PATH", help="also push to REGISTRY/PATH/IMAGE:TAG")
    parser.add_argument("--plain-http", action="store_true", help="push without TLS, to a registry on this machine")
    parser.add_argument("--prune", action="store_true", help="remove the images of older sources, and cached layers")
    parsed = parser.parse_args(arguments)
    names = tuple(parsed.images) or ("control", "engine-cpu")
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        parser.error(f"unknown image {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    try:
        built = build_images(
            names,
            tool=parsed.tool,
            tag=parsed.tag,
            base=parsed.base,
            push=parsed.push,
            plain_http=parsed.plain_http,
            prune=parsed.prune,
        )
    except ImageBuildError as error:
        print(f"images: {error}", file=sys.stderr)
        return 1
    print("\n".join(built))
    return 0


if __name__ == "__main__":
    sys.exit(main())
