"""Checkpoints that are quantised already: which formats are read, and as which weights."""

from engine.checkpoint.formats.modules import unpacked
from engine.checkpoint.formats.packing import packed_parts
from engine.checkpoint.formats.settings import settings_of, why_unreadable

__all__ = ["packed_parts", "settings_of", "unpacked", "why_unreadable"]
