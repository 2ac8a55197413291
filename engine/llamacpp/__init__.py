"""llama.cpp behind the Engine protocol; only `engine` and `library` import it."""
