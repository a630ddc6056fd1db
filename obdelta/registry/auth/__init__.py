"""Credentials, challenges and tokens for the upstream registry."""
