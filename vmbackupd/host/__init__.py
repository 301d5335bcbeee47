"""The machine we run on: its processes and its block devices."""
