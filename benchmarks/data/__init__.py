"""Readers of the data sets, each into the one schema of [`benchmarks.schema`]."""
