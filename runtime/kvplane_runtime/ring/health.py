"""The answer of ``/health``, the same on every rank: whether this rank is inside a ring that works.

Ready and not ready both say that the process is well: a rank that waits for others must not be restarted for it, since it holds
KV. Only one that hangs is to be restarted: its answer has a status of its own.
"""

from aiohttp import web


def answer(reason: str | None) -> web.Response:
    """200, or 503 with the reason against it, a sentence."""
    if reason is None:
        return web.json_response({"ready": True})
    return web.json_response({"ready": False, "reason": reason}, status=503)


def hangs(reason: str) -> web.Response:
    """500, with what shows that only a restart helps, a sentence."""
    return web.json_response({"ready": False, "reason": reason}, status=500)
