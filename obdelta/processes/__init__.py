"""Child processes: worker processes, which build, and server processes."""
