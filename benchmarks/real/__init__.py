"""A real language model in place of the miniature's own: `python -m benchmarks.real` (`make demo-real`)."""
