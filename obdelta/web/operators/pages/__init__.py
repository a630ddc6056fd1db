"""Pages for operators, made on the server; a script of a few lines keeps them live, and they work
without it.
"""
