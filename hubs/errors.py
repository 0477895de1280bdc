"""What is said where a model cannot be fetched."""

import errno
import os
import re
from pathlib import Path

AGAIN = "run the same command again, and it goes on where it stopped"


class DownloadError(Exception):
    """A model could not be fetched; the message is one sentence with the remedy."""


_PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_SOCKS = (
    "the proxy that your environment names speaks SOCKS; `pip install PySocks socksio` brings what"
    " that needs"
)


def sentence(
    error: Exception, source: str, repo: str, target: Path, access: str, other: str
) -> str:
    """What an error of a hub's client means for who asked for a repository.

    `access` says how one gets to read what is closed, and `other` what else to try.
    """
    # ModelScope's client tries every file, and then tells of all that failed.
    errors: list[Exception] = [error, *getattr(error, "failed_files", {}).values()]
    numbers = {getattr(error, "errno", None) for error in errors}
    if errno.ENOSPC in numbers:
        return f"the disk of {target} is full; make room and {AGAIN}"
    if numbers & _NOT_WRITABLE:
        return not_writable(target, errors[-1])
    statuses = {_status(error) for error in errors}
    if statuses & {401, 403}:
        return f"{source} does not let us read {repo}; {access}{other}"
    if 404 in statuses:
        return f"{source} has no {repo}, or not all of it; try again later{other}"
    reason = (str(errors[-1]).strip() or type(errors[-1]).__name__).splitlines()[0]
    if re.search("socksio|dependencies for socks", reason, re.IGNORECASE):
        return _SOCKS
    network = f"check the network{proxy_hint()}"
    return f"the download from {source} broke off ({reason}); {network}, then {AGAIN}"


def not_writable(target: Path, error: Exception) -> str:
    """What to do where a folder cannot be made or filled."""
    reason = getattr(error, "strerror", None) or error
    return (
        f"{target} cannot be written ({reason}); name a folder that can, with"
        " `python model_download.py NAME --dir DIR`, and give --model that"
    )


def _status(error: Exception) -> int | None:
    """The HTTP status that an error of either client stands for."""
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None) or getattr(error, "status_code", None)


def proxy_hint() -> str:
    """Which variable sends the clients to a proxy, to be said after `check the network`."""
    names = [name for name in _PROXIES if os.environ.get(name) or os.environ.get(name.lower())]
    return f" and the proxy that {names[0]} names" if names else ""
