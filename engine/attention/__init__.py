"""Attention of packed tokens: what a forward pass reads and writes of the KV cache, and how."""
