"""Tasks that wait for a batch that something else made."""
