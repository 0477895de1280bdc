"""The model and its KV cache on their devices: from tokens to logits."""
