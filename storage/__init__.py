"""Keeps things and decides nothing: the database's tables and statements, and the blobs."""
