"""Runs: specs, run directories, jobs, the device lock, and the available devices."""
