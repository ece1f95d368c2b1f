"""Model sources: what each becomes in the pod (arguments, environment, volumes)."""

from dataclasses import dataclass, field
from typing import Any

from kvplane_api import names
from kvplane_api.service import Model

VOLUME_MODEL = "model"
VOLUME_MODEL_CACHE = "model-cache"


@dataclass(frozen=True)
class RenderedSource:
    """What a model source adds to the engine container and its pod."""

    args: tuple[str, ...]
    env: tuple[dict[str, Any], ...] = ()
    volumes: tuple[dict[str, Any], ...] = ()
    mounts: tuple[dict[str, Any], ...] = field(default=())


def scheme(source: str) -> str:
    """The part before ``://``."""
    return source.partition("://")[0]


def render(model: Model) -> RenderedSource:
    """Arguments, environment and volumes for ``model.source``; its form was checked by the API server (CEL)."""
    rest = model.source.partition("://")[2]
    match scheme(model.source):
        case "hf":
            return _hub(model, rest)
        case "pvc":
            claim, _, path = rest.partition("/")
            return _mounted({"persistentVolumeClaim": {"claimName": claim, "readOnly": True}}, path)
        case "oci":
            return _mounted({"image": {"reference": rest, "pullPolicy": "IfNotPresent"}}, "")
        case "path":
            return _mounted({"hostPath": {"path": rest, "type": "Directory"}}, "")
        case other:
            raise ValueError(
                f"model.source must begin with hf://, pvc://, oci:// or path://; it begins with {other}://."
            )


def _mounted(volume: dict[str, Any], path: str) -> RenderedSource:
    directory = f"{names.PATH_MODEL}/{path.strip('/')}".rstrip("/")
    return RenderedSource(
        args=(directory,),
        # A mounted model is complete: a look at the hub would only delay the start, or fail it.
        env=({"name": "HF_HUB_OFFLINE", "value": "1"},),
        volumes=({"name": VOLUME_MODEL, **volume},),
        mounts=({"name": VOLUME_MODEL, "mountPath": names.PATH_MODEL, "readOnly": True},),
    )


def _hub(model: Model, rest: str) -> RenderedSource:
    repository, _, revision = rest.partition("@")
    args = [repository]
    if revision:
        args += ["--revision", revision, "--tokenizer-revision", revision]
    env: list[dict[str, Any]] = []
    if ref := model.token_secret_ref:
        env.append({"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": ref.name, "key": ref.key}}})
    volume: dict[str, Any] = {"emptyDir": {}}
    if model.cache and model.cache.claim_name:
        volume = {"persistentVolumeClaim": {"claimName": model.cache.claim_name}}
    elif model.cache and model.cache.size_limit:
        volume = {"emptyDir": {"sizeLimit": model.cache.size_limit}}
    return RenderedSource(
        args=tuple(args),
        env=tuple(env),
        volumes=({"name": VOLUME_MODEL_CACHE, **volume},),
        mounts=({"name": VOLUME_MODEL_CACHE, "mountPath": names.PATH_MODEL_CACHE},),
    )
