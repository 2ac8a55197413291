"""Tasks that run a batch."""
