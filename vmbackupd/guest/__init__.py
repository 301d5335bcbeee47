"""The host's side of the guest helper: starting it, talking to it, and reading what it says with suspicion."""
