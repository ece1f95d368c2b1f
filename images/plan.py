"""What must be run to bring the images up to date: a pure function of the sources' keys and the images that exist."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from images import debian
from images.recipes import Recipe, content_key
from images.tools import Commands


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    recipes: tuple[Recipe, ...]
    """In the order of `with_bases`."""
    tag: str
    """The tag of the images, beside the one that is their key."""
    base: str | None
    """An image reference for BASE; None for the base that debootstrap makes."""
    push: str | None = None
    """Registry and path to push to (`registry.example/team`), None not to push."""


@dataclass(frozen=True)
class Step:
    """One command of a plan."""

    title: str
    image: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Steps in order, and the images that they leave; no steps where all are up to date."""

    steps: tuple[Step, ...]
    images: tuple[str, ...]


def make_plan(
    request: Request, *, repository: Path, scratch: Path, commands: Commands, have: Mapping[str, str]
) -> Plan:
    """The commands for `request`; `have` gives image ids by name, `scratch` is a folder for the Debian base.

    An image is built when no image is tagged with its key, tagged when only its tag is missing or stale.
    """
    base = request.base or f"{commands.prefix}/base:{debian.base_key(repository)}"
    below: dict[str, str] = {}
    keyed: dict[str, str] = {}
    for recipe in request.recipes:
        below[recipe.name] = base if recipe.base_image is None else keyed[recipe.base_image]
        key = content_key(recipe, repository, below[recipe.name])
        keyed[recipe.name] = f"{commands.prefix}/{recipe.name}:{key}"

    steps: list[Step] = []
    if request.base is None and base not in have and any(name not in have for name in keyed.values()):
        steps += _base_steps(base, scratch, repository, commands)
    tagged = []
    for recipe in request.recipes:
        name, wanted = keyed[recipe.name], f"{commands.prefix}/{recipe.name}:{request.tag}"
        tagged.append(wanted)
        if name not in have:
            command = commands.build(
                containerfile=str(repository / recipe.containerfile),
                context=str(repository),
                arguments={recipe.base_argument: below[recipe.name]},
                names=(name, wanted),
            )
            steps.append(Step(f"image {recipe.name}: build", recipe.name, command))
        elif have[name] != have.get(wanted):
            steps.append(Step(f"image {recipe.name}: tag {request.tag}", recipe.name, commands.tag(name, wanted)))
    if request.push is not None:
        for recipe, wanted in zip(request.recipes, tagged, strict=True):
            destination = f"{request.push.rstrip('/')}/{recipe.name}:{request.tag}"
            for command in commands.push(wanted, destination):
                steps.append(Step(f"image {recipe.name}: push to {destination}", recipe.name, command))
    return Plan(steps=tuple(steps), images=tuple(tagged))


def _base_steps(base: str, scratch: Path, repository: Path, commands: Commands) -> list[Step]:
    bootstrap = [Step(f"image base: {c[0]}", "base", c) for c in debian.bootstrap_commands(scratch)]
    build = commands.build(
        containerfile=str(repository / debian.CONTAINERFILE), context=str(scratch), arguments={}, names=(base,)
    )
    remove = ("rm", "-f", str(scratch / "base.tar"))
    return [*bootstrap, Step("image base: build", "base", build), Step("image base: rm", "base", remove)]
