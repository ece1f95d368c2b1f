"""Recorded traffic through a policy and the simulated engine, in virtual time: an hour of requests in seconds.

Reading order: :mod:`traces` (what comes), :mod:`driver` (what happens), :mod:`ours` (our admission as a policy),
``__main__`` (which runs are made of it, and the table). Where the engine's figures come from: ``bench.engine.presets``.
"""
