"""The answer of ``/health``, the same on every rank: whether this rank is inside a ring that works.

Any answer says that the process is well: a rank that waits for others must not be restarted for it, since it holds KV.
"""

from aiohttp import web


def answer(reason: str | None) -> web.Response:
    """200, or 503 with the reason against it, a sentence."""
    if reason is None:
        return web.json_response({"ready": True})
    return web.json_response({"ready": False, "reason": reason}, status=503)
