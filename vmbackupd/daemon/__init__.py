"""The daemon's process: wiring, signals, systemd."""
