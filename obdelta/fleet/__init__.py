"""The fleet, as openBalena's API knows it: prepares and prunes deltas."""
