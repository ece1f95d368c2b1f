"""What an engine's KV memory is doing: evictions, tokens computed twice, thrashing. Pure: no I/O, the clock is an argument.

:mod:`ledger` follows the engine's KV events block by block, :mod:`account` adds up evictions and waste from the best
source there is (KV events, the engine's samples, an estimate) and says which it was, :mod:`thrash` decides whether the
engine thrashes. The sockets are in :mod:`kvplane_runtime.sidecar.kv_events`, the scrapes in
:mod:`kvplane_runtime.sidecar.engine`.
"""
