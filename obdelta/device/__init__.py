"""A client that acts as a device against any delta server, and verifies the result.

It blocks, and is for the command line, the demo and the tests. Nothing in the server imports it.
"""
