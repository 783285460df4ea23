"""Checks that every computing path works on this machine, on the bundled demo, offline."""
