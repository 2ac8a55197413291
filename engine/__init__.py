"""Turns requests into results; has never heard of batches, shards or databases."""
