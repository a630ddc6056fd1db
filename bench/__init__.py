"""Benchmarks of obdelta: container images from published packages, open-balena-delta for
comparison, and reports. Not installed with obdelta.
"""
