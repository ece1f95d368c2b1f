"""The only module that writes to the API server, and the only one that reads from it beside the watches.

Writes are idempotent and carry preconditions, so that a late one of a former leader is harmless: children are applied
server-side under one field manager with the uid of the object they were planned for, deletions name uid and
resourceVersion, status patches the resourceVersion they were computed from. Before each write the fence is asked whether
this process still may.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
from kubernetes.aio import client, config

from kvplane_api import names
from kvplane_operator import metrics
from kvplane_operator.plan.snapshot import Kind, Manifest, Ref, Version

Json = dict[str, Any]

_APPLY: Final = "application/apply-patch+yaml"
_MERGE: Final = "application/merge-patch+json"
_METADATA_LIST: Final = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"

_NEVER: Final = "1"
"""A resourceVersion that no object has, since the store's first write is its second revision. An apply that carries it
creates an object, or meets one and is answered 409: one request where looking first would take two, and nobody can come
between."""

PATHS: Final[Mapping[str, str]] = {
    Kind.DEPLOYMENT.value: "/apis/apps/v1/namespaces/{namespace}/deployments",
    Kind.STATEFUL_SET.value: "/apis/apps/v1/namespaces/{namespace}/statefulsets",
    Kind.SERVICE.value: "/api/v1/namespaces/{namespace}/services",
    Kind.CONFIG_MAP.value: "/api/v1/namespaces/{namespace}/configmaps",
    Kind.PDB.value: "/apis/policy/v1/namespaces/{namespace}/poddisruptionbudgets",
    "Pod": "/api/v1/namespaces/{namespace}/pods",
    "HorizontalPodAutoscaler": "/apis/autoscaling/v2/namespaces/{namespace}/horizontalpodautoscalers",
    "Event": "/api/v1/namespaces/{namespace}/events",
    "Lease": "/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases",
    names.KIND: f"/apis/{names.API_VERSION}/namespaces/{{namespace}}/{names.PLURAL}",
}


class ApiError(Exception):
    """The API server said no, or nothing: ApiError -> NotFound, Conflict, Refused, Unreachable."""

    def __init__(self, message: str, *, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class NotFoundError(ApiError):
    """404."""


class ConflictError(ApiError):
    """409: a precondition no longer holds, or the name is taken."""


class RefusedError(ApiError):
    """400, 403 or 422: sending it again will not help."""


class UnreachableError(ApiError):
    """No answer in time, 429 or 5xx: sending it again may help."""


_ERRORS: Final[Mapping[int, type[ApiError]]] = {
    400: RefusedError,
    403: RefusedError,
    404: NotFoundError,
    409: ConflictError,
    422: RefusedError,
}


@dataclass(frozen=True)
class Listing:
    """Metadata of all objects of a kind."""

    resource_version: str
    objects: dict[tuple[str, str], Version]
    """By namespace and name."""


async def connect() -> client.ApiClient:
    """A client from the pod's service account, or from the kubeconfig outside of a cluster."""
    configuration = client.Configuration()
    configuration.connection_pool_maxsize = 32
    # Else aiohttp looks for a .netrc and for proxies in the environment, on a thread, before every single request.
    configuration.client_session_kwargs = {"trust_env": False}
    try:
        config.load_incluster_config(client_configuration=configuration)
    except config.ConfigException:
        await config.load_kube_config(config_file=os.environ.get("KUBECONFIG"), client_configuration=configuration)
    return client.ApiClient(configuration)


class Cluster:
    """The operator's requests, each with its own time limit."""

    def __init__(
        self, api: client.ApiClient, *, timeout_seconds: float, fence: Callable[[], None] = lambda: None
    ) -> None:
        self._api = api
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._fence = fence

    async def get(self, namespace: str, ref: Ref) -> Manifest | None:
        """One child as it is; None if the name is free."""
        try:
            return await self._send("GET", ref.kind.value, namespace, ref.name)
        except NotFoundError:
            return None

    async def apply(
        self, namespace: str, ref: Ref, manifest: Manifest, *, uid: str | None, dry_run: bool = False
    ) -> Manifest:
        """Apply a child server-side: with a uid only that very object is changed, without one it is only created.

        Raises:
            ConflictError: the object is another one by now; or, without a uid, the name is taken.
        """
        guard = {"resourceVersion": _NEVER} if uid is None else {"uid": uid}
        body = {**manifest, "metadata": {**manifest["metadata"], **guard}}
        query = f"fieldManager={names.MANAGER}&force=true"
        if dry_run:
            query += "&dryRun=All"
        self._fence()
        return await self._send("PATCH", ref.kind.value, namespace, ref.name, body=body, kind=_APPLY, query=query)

    async def delete(self, namespace: str, ref: Ref, *, uid: str, resource_version: str) -> None:
        """Delete exactly the object that was seen; gone already is fine."""
        self._fence()
        body = {
            "propagationPolicy": "Background",
            "preconditions": {"uid": uid, "resourceVersion": resource_version},
        }
        try:
            await self._send("DELETE", ref.kind.value, namespace, ref.name, body=body)
        except NotFoundError:
            return

    async def patch_status(
        self, namespace: str, name: str, status: Mapping[str, Any], *, uid: str, resource_version: str
    ) -> Manifest:
        """Merge a patch into a service's status, if the service still is the version that was seen."""
        self._fence()
        body = {"metadata": {"uid": uid, "resourceVersion": resource_version}, "status": dict(status)}
        return await self._send("PATCH", names.KIND, namespace, name, body=body, kind=_MERGE, part="/status")

    async def annotate_pod(self, namespace: str, name: str, key: str, value: str, *, uid: str | None = None) -> None:
        """Set one annotation of a pod; a pod that is gone is fine.

        Raises:
            ConflictError: a ``uid`` was given, and the pod of that name is another one by now.
        """
        self._fence()
        body: Json = {"metadata": {"annotations": {key: value}, **({"uid": uid} if uid else {})}}
        try:
            await self._send("PATCH", "Pod", namespace, name, body=body, kind=_MERGE)
        except NotFoundError:
            return

    async def delete_pod(self, namespace: str, name: str, *, uid: str, force: bool) -> bool:
        """Delete exactly the pod that was seen, by ``force`` without waiting for its node; False if it was gone already.

        Raises:
            ConflictError: the pod of that name is another one by now.
        """
        self._fence()
        body: Json = {"preconditions": {"uid": uid}, **({"gracePeriodSeconds": 0} if force else {})}
        try:
            await self._send("DELETE", "Pod", namespace, name, body=body)
        except NotFoundError:
            return False
        return True

    async def create_event(self, namespace: str, event: Json) -> None:
        """Post an event."""
        self._fence()
        await self._send("POST", "Event", namespace, body=event)

    async def list_metadata(self, kind: str, namespace: str | None, *, selector: str | None) -> Listing:
        """Which objects of a kind there are, in which versions; metadata only, from the API server's cache."""
        query = "resourceVersion=0" + (f"&labelSelector={selector}" if selector else "")
        answer = await self._request("GET", kind, _collection(kind, namespace), query=query, accept=_METADATA_LIST)
        return Listing(
            resource_version=answer["metadata"]["resourceVersion"],
            objects={
                (metadata["namespace"], metadata["name"]): Version(metadata["uid"], metadata["resourceVersion"])
                for item in answer["items"] or ()  # null where there is none
                for metadata in (item["metadata"],)
            },
        )

    async def find(self, kind: str, namespace: str, name: str) -> Manifest | None:
        """One object as it is, by a list of that name: the right to get is not given for all kinds. None if there is none."""
        answer = await self._request(
            "GET", kind, _collection(kind, namespace), query=f"fieldSelector=metadata.name={name}"
        )
        return next(iter(answer["items"] or ()), None)

    async def list_pod_autoscalers(self, namespace: str | None) -> list[Manifest]:
        """All HorizontalPodAutoscalers of a namespace, or of all, from the API server's cache."""
        kind = "HorizontalPodAutoscaler"
        answer = await self._request("GET", kind, _collection(kind, namespace), query="resourceVersion=0")
        return list(answer["items"] or ())

    async def serves_llmservices(self) -> bool:
        """Whether the CRD is installed and established."""
        try:
            answer = await self._request("GET", names.KIND, f"/apis/{names.API_VERSION}")
        except NotFoundError:
            return False
        return any(resource["name"] == names.PLURAL for resource in answer.get("resources", ()))

    async def get_lease(self, namespace: str, name: str) -> Json | None:
        """The leader Lease, None if there is none yet."""
        try:
            return await self._send("GET", "Lease", namespace, name)
        except NotFoundError:
            return None

    async def create_lease(self, namespace: str, lease: Json) -> Json:
        """Create the leader Lease; ConflictError if somebody else just did."""
        return await self._send("POST", "Lease", namespace, body=lease)

    async def replace_lease(self, namespace: str, lease: Json) -> Json:
        """Replace the leader Lease; ConflictError if it changed since it was read."""
        return await self._send("PUT", "Lease", namespace, lease["metadata"]["name"], body=lease)

    async def _send(
        self,
        verb: str,
        resource: str,
        namespace: str,
        name: str | None = None,
        *,
        body: Json | None = None,
        kind: str = "application/json",
        query: str = "",
        part: str = "",
    ) -> Json:
        path = PATHS[resource].format(namespace=namespace) + (f"/{name}" if name else "") + part
        return await self._request(verb, resource, path, body=body, content_type=kind, query=query)

    async def _request(
        self,
        verb: str,
        resource: str,
        path: str,
        *,
        body: Json | None = None,
        content_type: str = "application/json",
        query: str = "",
        accept: str = "application/json",
    ) -> Json:
        url = f"{self._api.configuration.host}{path}" + (f"?{query}" if query else "")
        headers = {"Accept": accept, "Content-Type": content_type, "User-Agent": names.MANAGER}
        await self._api.update_params_for_auth(headers, [], ["BearerToken"], path, verb, body)
        started, code = time.monotonic(), 0
        try:
            response = await self._api.call_api(verb, url, headers, body=body, _request_timeout=self._timeout)
            code = response.status
            text = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise UnreachableError(f"{verb} {path}: no answer from the API server: {error!r}") from error
        except client.ApiException as error:
            code = error.status or 0
            text = error.body
        finally:
            metrics.API_REQUESTS.labels(verb, resource, str(code)).inc()
            metrics.API_SECONDS.labels(verb).observe(time.monotonic() - started)
        return _decode(verb, path, code, text)


def _collection(kind: str, namespace: str | None) -> str:
    """Path of all objects of a kind, in one namespace or in all."""
    if namespace is None:
        return PATHS[kind].replace("/namespaces/{namespace}", "")
    return PATHS[kind].format(namespace=namespace)


def _decode(verb: str, path: str, code: int, text: bytes | str) -> Json:
    try:
        answer: Json = json.loads(text) if text else {}
    except ValueError:
        answer = {"message": str(text)[:500]}
    if code < 300:
        return answer
    error = _ERRORS.get(code, UnreachableError)
    raise error(answer.get("message") or f"{verb} {path} was answered {code}.", code=code)
