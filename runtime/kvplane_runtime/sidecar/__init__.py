"""The sidecar beside every engine: proxy, drain, normalised KV metrics.

One per engine pod, one asyncio loop, no torch. Clients reach the engine only through it (port 8000); kubelet, operator
and Prometheus speak to its admin port (8001). Reading order is running order: :mod:`__main__` (settings), :mod:`app`
(start, run, stop), :mod:`config` (what the operator wants), :mod:`drain` (the gate), :mod:`engine` (health and scrapes),
:mod:`exposition` and :mod:`signals` (what the engine exports, by version), :mod:`metrics` and :mod:`admin` (what goes
out), :mod:`reference` (docs/metrics.md). In front of a ring's rank also :mod:`leader` (rank 0's drain) and
:mod:`passed_on` (what goes out as the engine gives it).
"""
