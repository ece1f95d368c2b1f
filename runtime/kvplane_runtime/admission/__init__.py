"""Admission: which request goes to the engine, which waits, and which is refused. Pure: the clock is an argument.

Reading order: :mod:`demand` (the words), :mod:`controller` (events in, decisions out); then what it decides with:
:mod:`lengths` (how long outputs get), :mod:`peak` (gate A: the KV to come), :mod:`trim` (its learned factor),
:mod:`prefill` (gate B), :mod:`pace` and :mod:`goals` (what one more costs those that run), :mod:`queue` (order and fairness),
:mod:`retry` (when to come back); :mod:`prompts` for callers that know only a prompt's bytes. What the gates do and why is
in docs/decisions/0008-admission.md.
"""
