"""Jobs: the pipeline of a backup, its journal, and recovery after a crash."""
