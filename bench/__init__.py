"""Benchmarks: every module here but `report` measures one thing and prints one JSON line."""
