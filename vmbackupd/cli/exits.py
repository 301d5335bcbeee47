"""What the exit status says."""

DONE = 0
FAILED = 1  # also: verify found damage
USAGE = 2
INCOMPLETE = 3  # done, but volumes are missing or degraded, which was allowed
DETACHED = 130  # interrupted while waiting; the job goes on
