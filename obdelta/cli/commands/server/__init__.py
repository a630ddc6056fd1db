"""Commands that run the server, and commands that talk to a running one."""
