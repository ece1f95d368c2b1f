"""How well thrashing is told: the detector of the sidecar on an engine whose waste is known token by token.

:mod:`model` is the engine, down to the block; :mod:`loads` what its users do; :mod:`trial` runs both under the sidecar's
own accounting and notes truth beside alarm; :mod:`__main__` sweeps cache size against working set and judges.
"""
