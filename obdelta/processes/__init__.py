"""Child processes: workers that build, and server processes."""
