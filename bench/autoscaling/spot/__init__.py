"""One service of the real vLLM that scales from one replica to two under a step of load, and back, on a real cluster.

    python -m bench.autoscaling.spot

The replay compares laws in simulated time; this shows once that what it simulates happens: a replica is asked for, loads, takes its
part of the load, and goes without a request being lost. Two engines at most run, and share 1.2 cores.
"""
