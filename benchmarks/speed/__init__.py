"""Every claim of speed as a ratio measured in one interleaved run."""
