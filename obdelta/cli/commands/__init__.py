"""One module for each command, in directories by subject."""
