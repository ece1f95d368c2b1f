"""What each image is made from, and the key that says whether it must be made again.

A key is the hash of everything that a build reads: the Containerfile, its inputs in the repository, and the keys or
references of the images it is made from. The key is also a tag: an image is up to date when a tag with its key exists, so
nothing is remembered outside the image store, and going back to older sources finds the older image.
"""

import hashlib
import stat
from dataclasses import dataclass
from pathlib import Path

KEY_DIGITS = 16
IGNORED_FOLDERS = frozenset({"__pycache__"})


@dataclass(frozen=True)
class Recipe:
    """One image of the project."""

    name: str
    containerfile: str
    """Path in the repository; the repository's root is the build's context."""
    inputs: tuple[str, ...]
    """Files and folders in the repository that the build reads."""
    base_argument: str = "BASE"
    """The build argument that names the image below."""
    base_image: str | None = None
    """The recipe of the image below, None for the Debian base that all others stand on."""
    parts: tuple[tuple[str, str], ...] = ()
    """Further images that files are taken from: the build argument that names each, and its recipe."""


CONTROL = Recipe(
    name="control",
    containerfile="images/control/Containerfile",
    inputs=(
        "LICENSE",
        "README.md",
        "operator",
        "pyproject.toml",
        "requirements/build.lock",
        "requirements/control.lock",
        "runtime",
    ),
)
ENGINE_CPU = Recipe(
    name="engine-cpu",
    containerfile="images/engine-cpu/Containerfile",
    inputs=(
        "images/engine-cpu/cuda_stubs.py",
        "images/engine-cpu/inspect_models.py",
        "requirements/build.lock",
        "requirements/engine-cpu.lock",
    ),
)
DEMO_MODEL = Recipe(
    name="demo-model",
    containerfile="images/demo-model/Containerfile",
    inputs=("images/demo-model/make_model.py",),
    base_argument="ENGINE",
    base_image="engine-cpu",
)
RING_CPU = Recipe(
    name="ring-cpu",
    containerfile="images/ring-cpu/Containerfile",
    inputs=(),
    base_argument="ENGINE",
    base_image="engine-cpu",
    parts=(("CONTROL", "control"),),
)
RECIPES = {recipe.name: recipe for recipe in (CONTROL, ENGINE_CPU, DEMO_MODEL, RING_CPU)}


def with_bases(names: tuple[str, ...]) -> tuple[Recipe, ...]:
    """The recipes named, each after those it is made from, none twice; raises KeyError for an unknown name."""
    ordered: dict[str, Recipe] = {}

    def add(recipe: Recipe) -> None:
        if recipe.base_image is not None:
            add(RECIPES[recipe.base_image])
        for _, part in recipe.parts:
            add(RECIPES[part])
        ordered.setdefault(recipe.name, recipe)

    for name in names:
        add(RECIPES[name])
    return tuple(ordered.values())


def content_key(recipe: Recipe, repository: Path, base: str, *parts: str) -> str:
    """The key of `recipe` on the image `base`, with files of the images `parts` (references that are themselves keys, or
    fixed): 16 hexadecimal digits."""
    digest = hashlib.sha256(base.encode())
    for part in parts:
        digest.update(f"{part}\n".encode())
    for name in (recipe.containerfile, *recipe.inputs):
        for path in _files(repository / name):
            executable = bool(path.stat().st_mode & stat.S_IXUSR)
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(repository)}\0{executable}\0{content}\n".encode())
    return digest.hexdigest()[:KEY_DIGITS]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = (p for p in path.rglob("*") if p.is_file() and p.suffix != ".pyc")
    return sorted(p for p in found if not IGNORED_FOLDERS.intersection(p.parts))
