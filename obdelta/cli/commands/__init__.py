"""One module for each command, in a folder for what it works on."""
