"""The operator: keeps what the cluster holds equal to what LLMServices ask for.

One direction of flow: ``handlers`` feed the ``workqueue``; ``reconcile`` takes one service at a time, ``observe`` makes an
immutable snapshot of it, ``plan`` computes everything that should be (pure), ``cluster`` writes what differs. No other
module talks to the API server; nothing here imports the runtime or torch.
"""
