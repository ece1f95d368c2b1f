"""What it costs the operator to scale a thousand services, and how long a service waits for its decision.

    python -m bench.operator.autoscaled

Real are etcd, the API server and the operator, a process of its own. The pods are objects without a kubelet, and their
sidecars are one server in this process (sidecars.py), to which the operator's address resolver leads. A decision is timed
from outside: from the moment in which a sidecar begins to tell of an overload until a watch brings the Deployment with more
replicas.
"""

from typing import Final

SIDECARS: Final = "KVPLANE_BENCH_SIDECARS"
"""Environment of the operator under test: the URL before each pod's address."""
