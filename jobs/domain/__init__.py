"""The vocabulary of the system: frozen types and pure functions, no I/O."""
