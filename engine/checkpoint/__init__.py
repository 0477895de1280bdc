"""How a folder's files become a model, and what its layers ask of the rest."""

from engine.checkpoint.checkpoint import load_model

__all__ = ["load_model"]
