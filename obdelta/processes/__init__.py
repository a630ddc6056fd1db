"""Child processes: workers that build, and further server processes."""
