"""How many replicas a service should have: one pure law, in production and in the replay bench.

``decide`` in ``law.py`` is the entry: signals, history, settings and the time in, a decision with its reasons and the next
history out. Nothing here does I/O, reads a clock or draws a random number. Demand is counted in replicas throughout; a
replica is a pod, or in mode Ring a whole group. ``None`` means unknown, never 0.

=============  ======================================================================================================
signals        what is known of each replica now, and what counts as missing
flows          rates from the sidecars' counters
learned        usable share of KV, prefill rate, time of residence
demand         how many replicas the work of now would fill, by cause
startup        how long a new replica takes, by state of the image
series         demand so far: the last minutes, hours and days
forecast       demand when a replica that is asked for now will serve
panic, hold    what forbids going down: an overload under way, a burst that is likely to come back
law            the decision
victims        which replicas go first
history        what one decision leaves to the next, and the part of it that survives a restart
=============  ======================================================================================================
"""
