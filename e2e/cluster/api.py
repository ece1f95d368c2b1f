"""A small synchronous client of one API server, as its admin: what starting and breaking a cluster needs, no more."""

import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from e2e.cluster import pki
from e2e.cluster.errors import ApiError, StartTimeoutError

Json = dict[str, Any]

MERGE_PATCH = "application/merge-patch+json"


class Api:
    """Requests to `server` ("https://host:port") with the admin certificate in `certificates`."""

    def __init__(self, server: str, certificates: Path, *, timeout_seconds: float = 10.0) -> None:
        self.server = server
        self._timeout = timeout_seconds
        context = ssl.create_default_context(cafile=certificates / f"{pki.CA}.crt")
        context.load_cert_chain(certificates / f"{pki.ADMIN}.crt", certificates / f"{pki.ADMIN}.key")
        # No proxies: the address is on this machine, whatever the environment says.
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )

    def request(self, method: str, path: str, body: object = None, *, content_type: str = "application/json") -> str:
        """The text of the answer.

        Raises:
            ApiError: the server answered with an error.
            OSError: it did not answer.
        """
        request = urllib.request.Request(  # noqa: S310 - the scheme is our own
            self.server + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": content_type},
        )
        try:
            with self._opener.open(request, timeout=self._timeout) as answer:
                text: str = answer.read().decode()
                return text
        except urllib.error.HTTPError as error:
            with error:
                text = error.read().decode(errors="replace")
            raise ApiError(error.code, _message(text)) from None

    def get(self, path: str) -> Json:
        answer: Json = json.loads(self.request("GET", path))
        return answer

    def create(self, path: str, body: Mapping[str, object]) -> None:
        """POST; an object that is there already is left as it is."""
        try:
            self.request("POST", path, body)
        except ApiError as error:
            if error.status != 409:
                raise

    def patch(self, path: str, body: Mapping[str, object]) -> None:
        """A JSON merge patch."""
        self.request("PATCH", path, body, content_type=MERGE_PATCH)

    def delete(self, path: str) -> None:
        self.request("DELETE", path)

    def ready(self) -> bool:
        """Whether the API server says of itself that it is ready."""
        return self.request("GET", "/readyz") == "ok"


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return text.strip()[:500]


def wait_for(
    what: str, ready: Callable[[], bool], *, seconds: float, where: str, interval_seconds: float = 0.05
) -> None:
    """Poll until `ready()`; a server that does not answer yet, or answers with an error, is not ready.

    Raises:
        StartTimeoutError: after `seconds`; its message names `where` to look, and the last error.
    """
    end, last = time.monotonic() + seconds, ""
    while True:
        try:
            if ready():
                return
        except (OSError, ApiError) as error:
            last = f" The last error was: {error}"
        if time.monotonic() > end:
            raise StartTimeoutError(f"{what}: not within {seconds:.0f} s; read {where}.{last}")
        time.sleep(interval_seconds)


def condition(obj: Json, kind: str = "Ready") -> bool:
    """Whether the object's condition of this kind is True."""
    conditions = obj.get("status", {}).get("conditions") or []
    return any(c["type"] == kind and c["status"] == "True" for c in conditions)
