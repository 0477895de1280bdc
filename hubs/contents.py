"""Which files of a repository serving reads."""

import re
from collections.abc import Iterable

from hubs.errors import DownloadError

FILES = (
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)"
    r"\.json|tokenizer\.model|merges\.txt|chat_template\.jinja|LICENSE.*"
)
# The first format that the repository has is the one to take.
WEIGHTS = (
    r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?",
    r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?",
)


def wanted(names: Iterable[str]) -> list[str]:
    """Those of a repository's files that serving needs."""
    top = sorted(name for name in names if "/" not in name)
    for pattern in WEIGHTS:
        if weights := [name for name in top if re.fullmatch(pattern, name)]:
            return [name for name in top if re.fullmatch(FILES, name)] + weights
    raise DownloadError("the repository has no weights in a format that the server reads")
