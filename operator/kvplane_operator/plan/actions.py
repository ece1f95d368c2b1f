"""What a plan may ask to be done, as values."""

from dataclasses import dataclass

from kvplane_operator.plan.snapshot import Manifest, Ref


@dataclass(frozen=True)
class Write:
    """One child to apply. ``exists``: an object of that name is known to be ours; else its name must be free."""

    ref: Ref
    manifest: Manifest
    exists: bool
    uid: str | None
    why: str


@dataclass(frozen=True)
class Deletion:
    """One child to delete, only if it still is the object that was seen."""

    ref: Ref
    uid: str
    resource_version: str


@dataclass(frozen=True)
class PodDeletion:
    """One pod to delete, only if it still is the one that was seen."""

    pod: str
    uid: str
    why: str
    force: bool = False
    """Without waiting for its node to say that it ended."""


@dataclass(frozen=True)
class DeletionCost:
    """One pod that is told before its Deployment is scaled down how early it goes: lower goes first."""

    pod: str
    uid: str
    cost: int


@dataclass(frozen=True)
class Drain:
    """One rank 0 whose sidecar is asked to take no more requests."""

    pod: str
    uid: str
    ip: str
    marked: bool
    """It bears the mark already."""
