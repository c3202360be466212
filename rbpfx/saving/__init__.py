"""Saving and loading of pruned networks; no pickle, and nothing in a file is ever executed."""
