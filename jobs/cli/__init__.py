"""The command line `batchctl`: one module per noun."""
