"""Write chat-api.pyz, the whole server in one file.

    python bundle.py
    python chat-api.pyz --model llama-3-8b

The libraries of requirements.txt are not in it; models/ lies beside it.
"""

import shutil
import tempfile
import zipapp
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = ("api.py", "chat_page", "engine", "hubs", "model_download.py", "serving")
# As `python api.py` would start it.
START = 'import runpy\n\nrunpy.run_module("api", run_name="__main__", alter_sys=True)\n'


def write(archive: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for source in (HERE / part for part in PARTS):
            if source.is_dir():
                skipped = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, Path(folder, source.name), ignore=skipped)
            else:
                shutil.copy(source, folder)
        Path(folder, "__main__.py").write_text(START, encoding="utf-8")
        interpreter = "/usr/bin/env python3"
        zipapp.create_archive(folder, archive, interpreter, compressed=True)


if __name__ == "__main__":
    write(HERE / "chat-api.pyz")
