"""From messages to token ids: templates, special tokens, what a model's family asks."""
