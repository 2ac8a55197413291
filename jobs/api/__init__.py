"""The REST API: the OpenAI Files and Batches protocol, and a little more."""
