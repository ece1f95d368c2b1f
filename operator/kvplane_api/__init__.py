"""The kvplane API: what the operator, the runtime and users agree on.

Everything two components must spell the same way lives here and nowhere else: the ``LLMService`` resource and the CRD
generated from it, condition types and reasons, labels, ports, environment names, the wire models between operator and
sidecar, and the capacity arithmetic. It imports pydantic and nothing of the operator or the runtime.
"""
