"""Measuring obdelta: container images from published packages, the peer, the figures. Not installed
with obdelta.
"""
