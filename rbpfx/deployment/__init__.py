"""Deployment: the form of a network to run, and files of it for other runtimes."""
