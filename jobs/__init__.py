"""Orchestration and edges of the batch processor, and the vocabulary they share."""
