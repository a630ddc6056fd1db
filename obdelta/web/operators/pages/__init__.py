"""Pages for operators, rendered on the server. A short script keeps them live; they also work
without it.
"""
