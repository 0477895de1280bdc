"""Variables that the hubs' clients read: what is wrong with one is said by its name."""

import os
import re

from hubs.errors import DownloadError

_ENDPOINTS = {"modelscope": ["MODELSCOPE_ENDPOINT"], "huggingface": ["HF_ENDPOINT"]}
_TOKENS = {
    "modelscope": ["MODELSCOPE_API_TOKEN"],
    "huggingface": ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"],
}


def check_environment(source: str) -> None:
    """Raise DownloadError for a variable that a hub's client could only stumble over."""
    for name in _TOKENS[source]:
        if name in os.environ:
            os.environ[name] = os.environ[name].strip()
        # A file of variables keeps the quotation marks that a shell takes away.
        if re.search(r"[^!-~]|[\"']", os.environ.get(name, "")):
            raise DownloadError(
                f"{name} holds quotation marks, spaces or other characters that no token has;"
                " set it to the token alone"
            )
    for name in _ENDPOINTS[source]:
        url = os.environ.get(name, "")
        if url and not re.fullmatch(r"https?://[^\s\"']+", url):
            raise DownloadError(f"{name} must be a URL such as https://host, not {url!r}")
