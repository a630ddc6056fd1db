"""Commands that work on images and deltas: they build, check, explain, export and verify."""
