"""Access of devices: tokens, what they grant, limits on one client, and signed URLs."""
