"""How fast, and at what standing cost, an operator turns services into their children; beside LeaderWorkerSet's.

    python -m bench.operator

Each controller gets a fresh, real API server with nothing else on it: no kubelet, no built-in controllers. Everything is
timed from outside, by a watch (client.py); API requests are counted by the API server (requests.py). LeaderWorkerSet is
the nearest kind of controller in Go: one object becomes one StatefulSet and one Service. It is built from its Go module,
and runs with the client limits that it ships with.
"""
