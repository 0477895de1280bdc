"""A hub on this machine, which speaks as much of both hubs' language as their clients need.

It serves one folder as whatever repository is asked for, counts what it sends, and can be told
to break off, or to refuse.
"""

import hashlib
import json
import select
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingTCPServer
from urllib.parse import parse_qs, unquote, urlsplit

from tests.conftest import PATIENCE

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What is served, what was asked for, and what goes wrong."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.sent: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()  # repositories
        self.break_after: dict[str, int] = {}  # a file ends after so many bytes, and is then gone
        self.damaged: set[str] = set()  # a file that is not what the listing says
        self.refuse_list = self.refuse_files = 0  # the status instead of an answer
        self.stalled = ""  # a file of which half is sent until this is set
        self.flowing = threading.Event()
        self.url = ""

    def files(self) -> dict[str, bytes]:
        paths = [path for path in self.folder.rglob("*") if path.is_file()]
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in paths}


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def handle(self) -> None:
        # A client that was stopped is no error.
        with suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        match url.path.strip("/").split("/"):
            case ["api", "v1", "models", owner, name, "repo", "files"] if (
                query["Revision"] == "master"
            ):
                self.hub.asked[f"{owner}/{name}"] += 1
                self.listing(self.modelscope_listing())
            case ["api", "v1", "models", _, _, "repo"] if query["Revision"] == "master":
                self.file(query["FilePath"])
            case ["api", "models", owner, name] if query["blobs"]:
                self.hub.asked[f"{owner}/{name}"] += 1
                self.listing(self.huggingface_listing())
            case [_, _, "resolve", revision, *path] if revision == REVISION:
                self.redirect("/elsewhere/" + "/".join(path))
            case ["elsewhere", *path]:
                self.file(unquote("/".join(path)))
            case _:
                self.refuse(404)

    def modelscope_listing(self) -> dict[str, object]:
        files: list[dict[str, object]] = [{"Path": "original", "Type": "tree", "Size": 0}]
        for path, content in self.hub.files().items():
            sha256 = hashlib.sha256(content).hexdigest()
            files.append({"Path": path, "Type": "blob", "Size": len(content), "Sha256": sha256})
        return {"Code": 200, "Success": True, "Data": {"Files": files}}

    def huggingface_listing(self) -> dict[str, object]:
        files: list[dict[str, object]] = []
        for path, content in self.hub.files().items():
            files.append({"rfilename": path, "size": len(content), "blobId": "0" * 40})
            # Only large files have a checksum.
            if not path.endswith(".json"):
                sha256 = hashlib.sha256(content).hexdigest()
                files[-1]["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": 134}
        return {"id": "someone/something", "sha": REVISION, "siblings": files}

    def listing(self, answer: dict[str, object]) -> None:
        if self.hub.refuse_list:
            return self.refuse(self.hub.refuse_list)
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def redirect(self, place: str) -> None:
        if self.hub.refuse_files:
            return self.refuse(self.hub.refuse_files)
        self.answer(302, {"Location": self.hub.url + place})

    def refuse(self, status: int) -> None:
        self.answer(status, {"X-Error-Code": "GatedRepo"} if status in (401, 403) else {})

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def file(self, name: str) -> None:
        if self.hub.refuse_files:
            return self.refuse(self.hub.refuse_files)
        content = self.hub.files()[name]
        if name in self.hub.damaged:
            content = bytes(len(content))
        left = self.hub.break_after.get(name, len(content))
        if name in self.hub.break_after and not left:
            return self.refuse(500)
        start = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
        if start > 0:
            self.send_response(206)
            total = len(content)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:][:left]
        half = len(body) // 2
        for part in (body[:half], body[half:]):
            self.wfile.write(part)
            self.hub.sent[name] += len(part)
            if name == self.hub.stalled:
                self.hub.flowing.wait(PATIENCE)
        if name in self.hub.break_after:
            self.hub.break_after[name] = 0
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve_hub(folder: Path) -> Iterator[Hub]:
    hub = Hub(folder)
    answers = type("AnswersOfOneHub", (Answers,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), answers) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class Socks(StreamRequestHandler):
    """As much of SOCKS 5 (RFC 1928) as it takes to be led to one address, whatever is asked for."""

    rbufsize = 0  # what was read ahead would not be seen by select
    goal: tuple[str, int]

    def handle(self) -> None:
        _, methods = self.rfile.read(2)
        self.rfile.read(methods)
        self.wfile.write(b"\5\0")
        *_, kind = self.rfile.read(4)
        self.rfile.read({1: 4, 4: 16}.get(kind) or self.rfile.read(1)[0])
        self.rfile.read(2)
        self.wfile.write(b"\5\0\0\1" + bytes(6))
        with socket.create_connection(self.goal) as goal:
            while ready := select.select([self.connection, goal], [], [], PATIENCE)[0]:
                for end in ready:
                    if not (data := end.recv(65536)):
                        return
                    (goal if end is self.connection else self.connection).sendall(data)


@contextmanager
def serve_socks(url: str) -> Iterator[str]:
    """The host and port of a proxy by which every address leads to a URL's server."""
    goal = ("127.0.0.1", urlsplit(url).port)
    handler = type("SocksToOneServer", (Socks,), {"goal": goal})
    with ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
