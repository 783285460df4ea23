"""What every command takes on a machine, from shapes alone: memory, bytes read and time."""
