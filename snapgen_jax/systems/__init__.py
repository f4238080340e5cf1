"""Published text-to-image systems, put together from our networks and their weights. One file is one system.

A system is frozen: a teacher, or something to draw with. Each module has a class `SYSTEM` with an attribute `Config`.
"""
