"""Benchmarks: one script per question; run them as `python -m benchmarks.NAME`."""
