"""Where the rooms are wired together, one module a part of the server; what is made here is handed in elsewhere."""
