"""Smaller tables of the catalogue, one module each."""
