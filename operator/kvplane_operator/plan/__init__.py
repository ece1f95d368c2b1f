"""What should be: pure functions from a snapshot of one service to the wanted children and status.

Nothing here does I/O or reads a clock; ``make_plan`` in ``service.py`` is the entry, its result is a printable value.
"""
