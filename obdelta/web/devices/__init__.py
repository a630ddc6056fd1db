"""HTTP for devices: the delta API and the registry API."""
