"""Checkpoints: save in the background, find, verify, resume, prune."""
