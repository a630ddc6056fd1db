"""Sections of the pages that have a subject of their own, and the data that they display."""
