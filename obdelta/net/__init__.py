"""Listening: the PROXY protocol, TLS, and limits on what strangers may cost. Knows nothing of
deltas.
"""
