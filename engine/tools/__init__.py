"""Calls of tools: how a model writes them, the grammar that holds it to that, the way back."""
