"""What is said where a model cannot be fetched."""

import errno
from pathlib import Path

AGAIN = "run the same command again, and it goes on where it stopped"


class DownloadError(Exception):
    """A model could not be fetched; the message is one sentence with the remedy."""


def sentence(
    error: Exception, source: str, repo: str, target: Path, access: str, other: str
) -> str:
    """What an error of a hub's client means for who asked for a repository.

    `access` says how one gets to read what is closed, and `other` what else to try.
    """
    # ModelScope's client tries every file, and then tells of all that failed.
    errors: list[Exception] = [error, *getattr(error, "failed_files", {}).values()]
    if any(getattr(error, "errno", None) == errno.ENOSPC for error in errors):
        return f"the disk of {target} is full; make room and {AGAIN}"
    statuses = {_status(error) for error in errors}
    if statuses & {401, 403}:
        return f"{source} does not let us read {repo}; {access}{other}"
    if 404 in statuses:
        return f"{source} has no {repo}, or not all of it; try again later{other}"
    reason = (str(errors[-1]).strip() or type(errors[-1]).__name__).splitlines()[0]
    return f"the download from {source} broke off ({reason}); check the network, then {AGAIN}"


def _status(error: Exception) -> int | None:
    """The HTTP status that an error of either client stands for."""
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None) or getattr(error, "status_code", None)
