"""Commands for setting up a server, and for the command line itself."""
