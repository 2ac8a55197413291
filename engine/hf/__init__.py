"""Hugging Face transformers: continuous batching over bf16 or NF4 weights."""
