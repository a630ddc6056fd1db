"""Inputs of builds: manifests, blobs, layers and trees of images."""
