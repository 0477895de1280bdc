"""Checkpoints that are quantised already: which formats are read, and as which weights."""

from engine.checkpoint.formats.modules import unpacked
from engine.checkpoint.formats.settings import settings_of, why_unreadable

__all__ = ["settings_of", "unpacked", "why_unreadable"]
