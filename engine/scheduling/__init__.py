"""Who is computed when: requests, their rows of the KV cache, and the tokens that come of it."""
