"""``vmbackupctl``: a client of the D-Bus API and nothing else."""
