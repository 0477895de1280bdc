"""How a model on a hub is named: by its hub id, by the address of its page, with a GGUF file."""

import re
from typing import NamedTuple

# A model's name on a hub.
HUB_ID = r"\w[\w.-]*/\w[\w.-]*"

_HOSTS = (
    r"(?P<huggingface>hf\.co|huggingface\.co|hf-mirror\.com)"
    r"|(?P<modelscope>(www\.)?modelscope\.(cn|ai)(/models)?)"
)
# ORG/NAME:QUANT is llama.cpp's and ollama's spelling, ORG/NAME@QUANT LM Studio's.
_FORM = re.compile(
    rf"((https?://)?({_HOSTS})/)?(?P<repo>{HUB_ID})"
    r"([:@](?P<quant>\w[\w.-]*)"
    r"|/(resolve|blob)/(main|master)/(?P<file>[^?#]+\.gguf)(\?[^#]*)?"
    r"|/(tree/(main|master)|summary|files)?/?)?",
    re.IGNORECASE,
)


class Reference(NamedTuple):
    """A repository, which of its GGUF files is meant, and the hub, where these are said."""

    repo: str
    quant: str = ""
    source: str | None = None


def read_reference(text: str) -> Reference | None:
    """What a text names on a hub, if it is spelled as such a name."""
    if not (found := _FORM.fullmatch(text)):
        return None
    sources = [source for source in ("modelscope", "huggingface") if found[source]]
    return Reference(found["repo"], found["quant"] or found["file"] or "", *sources)
