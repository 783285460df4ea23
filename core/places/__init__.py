"""Where a run goes: this machine, a SLURM cluster, or another machine over SSH."""
