"""Listening sockets: the PROXY protocol, TLS, and limits on the cost of untrusted clients. Contains
nothing about deltas.
"""
