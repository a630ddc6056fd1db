"""The C kernel and its binding."""
