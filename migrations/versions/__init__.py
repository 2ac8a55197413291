"""One module per change, NNNN_what_changes."""
