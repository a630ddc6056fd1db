"""Replicas agree through Redis which of them builds a pair."""
