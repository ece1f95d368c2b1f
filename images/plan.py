"""What must be run to bring the images up to date: a pure function of the sources' keys and the images that exist."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from images import debian
from images.recipes import KEY_DIGITS, RECIPES, content_key, with_bases
from images.tools import Commands


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    names: tuple[str, ...]
    """Images to leave and to push; those below them are built where needed."""
    tag: str
    """The tag of the images, beside the one that is their key."""
    base: str | None
    """An image reference for BASE; None for the base that debootstrap makes."""
    push: str | None = None
    """Registry and path to push to (`registry.example/team`), None not to push."""
    prune: bool = False
    """Remove the images of older sources afterwards, which are kept for going back to them."""


@dataclass(frozen=True)
class Step:
    """One command of a plan."""

    title: str
    image: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Steps in order, and the full names of the images asked for; no steps where all are up to date."""

    steps: tuple[Step, ...]
    images: tuple[str, ...]


def make_plan(
    request: Request, *, repository: Path, scratch: Path, commands: Commands, have: Mapping[str, str]
) -> Plan:
    """The commands for `request`; `have` gives image ids by name, `scratch` is a folder for the Debian base.

    An image is built when no image is tagged with its key, tagged when only its tag is missing or stale.
    """
    base = request.base or f"{commands.prefix}/base:{debian.base_key(repository)}"
    recipes = with_bases(request.names)
    arguments: dict[str, dict[str, str]] = {}
    keyed: dict[str, str] = {}
    for recipe in recipes:
        below = base if recipe.base_image is None else keyed[recipe.base_image]
        parts = {argument: keyed[part] for argument, part in recipe.parts}
        arguments[recipe.name] = {recipe.base_argument: below, **parts}
        key = content_key(recipe, repository, below, *parts.values())
        keyed[recipe.name] = f"{commands.prefix}/{recipe.name}:{key}"

    steps: list[Step] = []
    if request.base is None and base not in have and any(name not in have for name in keyed.values()):
        steps += _base_steps(base, scratch, repository, commands)
    tagged = {recipe.name: f"{commands.prefix}/{recipe.name}:{request.tag}" for recipe in recipes}
    for recipe in recipes:
        name, wanted = keyed[recipe.name], tagged[recipe.name]
        if name not in have:
            command = commands.build(
                containerfile=str(repository / recipe.containerfile),
                context=str(repository),
                arguments=arguments[recipe.name],
                names=(name, wanted),
            )
            steps.append(Step(f"image {recipe.name}: build", recipe.name, command))
        elif have[name] != have.get(wanted):
            steps.append(Step(f"image {recipe.name}: tag {request.tag}", recipe.name, commands.tag(name, wanted)))
    if request.push is not None:
        for image in dict.fromkeys(request.names):
            destination = f"{request.push.rstrip('/')}/{image}:{request.tag}"
            for command in commands.push(tagged[image], destination):
                steps.append(Step(f"image {image}: push to {destination}", image, command))
    if request.prune and (stale := stale_images(have, keep={base, *keyed.values()}, prefix=commands.prefix)):
        for command in commands.remove(stale):
            steps.append(Step(f"removing {len(stale)} older images", "prune", command))
    return Plan(steps=tuple(steps), images=tuple(tagged[image] for image in request.names))


def stale_images(have: Iterable[str], *, keep: Collection[str], prefix: str) -> tuple[str, ...]:
    """Names that are a key of one of our images, of sources that are not those of `keep`; nobody else's images."""
    ours = "|".join(("base", *(name for name in RECIPES if any(f"{prefix}/{name}:" in kept for kept in keep))))
    keyed = re.compile(rf"{re.escape(prefix)}/({ours}):[0-9a-f]{{{KEY_DIGITS}}}")
    return tuple(sorted(name for name in have if keyed.fullmatch(name) and name not in keep))


def _base_steps(base: str, scratch: Path, repository: Path, commands: Commands) -> list[Step]:
    bootstrap = [Step(f"image base: {c[0]}", "base", c) for c in debian.bootstrap_commands(scratch)]
    build = commands.build(
        containerfile=str(repository / debian.CONTAINERFILE), context=str(scratch), arguments={}, names=(base,)
    )
    remove = ("rm", "-f", str(scratch / "base.tar"))
    return [*bootstrap, Step("image base: build", "base", build), Step("image base: rm", "base", remove)]
