"""Every claim about speed as a ratio measured in one interleaved run."""
