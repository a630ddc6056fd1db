"""The log: which lines are written and how, and the name of the request that a line belongs to."""
