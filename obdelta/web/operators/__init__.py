"""HTTP for operators: pages, health, metrics and their API."""
