"""A repository on a hub, by way of the hub's own client: what it holds, and its files."""

import hashlib
import os
from pathlib import Path

from hubs.errors import DownloadError


class _ModelScope:
    """A repository on ModelScope.

    What it has of a file stays in `<file>.incomplete`, and it goes on from there.
    """

    closed = "set MODELSCOPE_API_TOKEN to the token of an account that may read it"

    def __init__(self, repo: str):
        # By default it gives up a file after an hour, too soon for 8 GB on a slow line.
        os.environ.setdefault("MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT", "86400")
        # Not `modelscope`, which wraps this package and imports torch.
        from modelscope_hub import HubApi

        self.repo, self.api = repo, HubApi()

    def sizes(self) -> dict[str, int]:
        """The bytes of each file."""
        self.files = [
            file for file in self.api.list_repo_files(self.repo, "model") if not file.is_dir
        ]
        return {file.path: file.size for file in self.files}

    def download(self, names: list[str], folder: Path) -> None:
        """Fetch these files, of which there is at least one."""
        listing = [
            {"Path": file.path, "Size": file.size, "Sha256": file.sha256}
            for file in self.files
            if file.path in names
        ]
        self.api.download_repo(self.repo, "model", local_dir=folder, file_list=listing)


class _HuggingFace:
    """The same on Hugging Face.

    Its `snapshot_download` throws away what it has of a file when it is stopped; the function
    beneath it, which fetches one file, can go on, so it is that which is called here.
    """

    closed = "accept the licence at https://huggingface.co/{repo} and set HF_TOKEN to your token"

    def __init__(self, repo: str):
        from huggingface_hub import HfApi

        self.repo, self.info = repo, HfApi().model_info(repo, files_metadata=True, timeout=30)

    def sizes(self) -> dict[str, int]:
        """The bytes of each file."""
        return {file.rfilename: file.size or 0 for file in self.info.siblings or []}

    def download(self, names: list[str], folder: Path) -> None:
        """Fetch these files."""
        for file in self.info.siblings or []:
            if file.rfilename in names:
                part = self._download(file.rfilename, file.size or 0, folder)
                if file.lfs and _sha256(part) != file.lfs.sha256:
                    part.unlink()
                    raise DownloadError(f"{part} came damaged; run the same command again")
                os.replace(part, folder / file.rfilename)

    def _download(self, name: str, size: int, folder: Path) -> Path:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        part = folder / f"{name}.incomplete"
        part.parent.mkdir(exist_ok=True)
        with open(part, "ab" if size_of(part) <= size else "wb") as file:
            http_get(
                hf_hub_url(self.repo, name, revision=self.info.sha),
                file,
                resume_size=file.tell(),
                headers=build_hf_headers(),
                expected_size=size,
                displayed_filename=name,
            )
        return part


Hub = _ModelScope | _HuggingFace
HUBS: dict[str, type[Hub]] = {"modelscope": _ModelScope, "huggingface": _HuggingFace}


def size_of(path: Path) -> int:
    """The bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
