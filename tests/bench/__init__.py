"""How fast, how small: the project against its peers and against the machine's limits, ``./dev bench``.

Every figure of a row comes from one run on one machine. Each measurement is a fresh process; the tools of a row take
turns (ours, the first peer, ... and again), so that a machine that slows down slows all of them. Before a measurement
everything dirty is written back and everything that will be read is in the page cache. docs/performance.md tells how
to read the table, and what bounds each row.
"""
