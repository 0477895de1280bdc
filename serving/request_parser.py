"""HTTP/1.1 as bytes: h11's parser, stricter, and able to begin an answer before it is known."""

import re
from typing import Any, NoReturn
from urllib.parse import urlsplit

import h11

_BEGINNING = b"HTTP/1.1 "
# Most lines of a request's head, and of its trailers; as Apache and gunicorn, and a few more.
MAX_HEADERS = 128
# Most bytes of a head, and of what frames the chunks of a body: their sizes, extensions, trailers.
MAX_HEADER_BYTES = 64 * 2**10
# Chunks that are read in one go: h11 takes some ten microseconds for each, however small it is.
CHUNKS_AT_ONCE = 64

_END_OF_HEAD = re.compile(rb"\n\r?\n")
# What ends a body in chunks, where h11 has not taken the end of the chunk before it.
_LAST_CHUNK = re.compile(rb"\r?\n?0+[ \t]*(?:;[^\n]*)?\r\n")


class RequestParser(h11.Connection):
    """h11's, but what a request is made of is bounded in number, and not in bytes alone.

    A request that states its body's length in two ways is refused: a proxy before us could take
    the other one, and what lies between for a second request.
    """

    num_begun = 0  # bytes of the next answer that are sent already
    refusal = ""  # why what came is refused, where h11 would not say so
    at_chunk = False  # a chunk's size comes next
    in_trailers = False
    num_unexplained = 0  # bytes received since the head that were no data of the body, so far
    chunks_left = CHUNKS_AT_ONCE

    def begin_answer(self) -> bytes:
        """The next byte with which an answer begins, whatever it will be; none if it has begun."""
        if self.our_state is not h11.SEND_RESPONSE or self.num_begun == len(_BEGINNING):
            return b""
        self.num_begun += 1
        return _BEGINNING[self.num_begun - 1 : self.num_begun]

    def send(self, event: Any) -> Any:
        """The bytes of an event, without those that are sent already."""
        data = super().send(event)
        if data and self.num_begun:
            data = data[self.num_begun :]
            self.num_begun = 0
        return data

    @property
    def has_more_chunks(self) -> bool:
        """Whether `next_event` said NEED_DATA only because so many chunks were enough for once."""
        return not self.chunks_left

    def go_on(self) -> None:
        """Let `next_event` read further chunks."""
        self.chunks_left = CHUNKS_AT_ONCE

    def receive_data(self, data: bytes) -> None:
        super().receive_data(data)
        self.num_unexplained += len(data)

    def next_event(self) -> Any:
        """h11's; NEED_DATA also after so many chunks, see `has_more_chunks`."""
        if self.their_state is h11.IDLE:
            self._check_head()
        elif self.their_state is h11.SEND_BODY:
            if self.has_more_chunks:
                return h11.NEED_DATA
            self._check_trailers()
        event = super().next_event()
        if isinstance(event, h11.Request):
            return self._begun(event)
        if isinstance(event, h11.Data):
            self.at_chunk = event.chunk_end
            self.num_unexplained -= len(event.data)
            self.chunks_left -= event.chunk_start
        if self.their_state is h11.SEND_BODY:
            self._check_framing()
        return event

    def _begun(self, request: h11.Request) -> h11.Request:
        """The request, with its target as the path that it names."""
        names = {name for name, _ in request.headers}
        if {b"content-length", b"transfer-encoding"} <= names:
            self._refuse("the body's length is stated twice: Content-Length, Transfer-Encoding")
        self.at_chunk, self.in_trailers = b"transfer-encoding" in names, False
        self.num_unexplained = len(self.trailing_data[0])
        if not request.target.lower().startswith((b"http://", b"https://")):
            return request
        try:
            return _with_path(request)
        except ValueError as error:
            self._refuse(f"the request's target is no URL: {error}")

    def _check_head(self) -> None:
        pending = self.trailing_data[0]
        if end := _END_OF_HEAD.search(pending):
            if end.end() > MAX_HEADER_BYTES:
                self._refuse(f"the headers have more than {MAX_HEADER_BYTES} bytes")
            self._check_lines(pending[: end.start()], "headers")

    def _check_trailers(self) -> None:
        pending = self.trailing_data[0]
        # Behind a chunk's size, which h11 may have taken alone, data looks like anything.
        begun = getattr(self._reader, "_bytes_in_chunk", 0)
        if self.at_chunk and not begun and (last := _LAST_CHUNK.match(pending)):
            self.at_chunk, self.in_trailers = False, True
            pending = pending[last.end() :]
        if self.in_trailers:
            self._check_lines(pending, "trailers")

    def _check_lines(self, lines: bytes, name: str) -> None:
        if lines.count(b"\n") > MAX_HEADERS:
            self._refuse(f"there are more than {MAX_HEADERS} {name}; send fewer")

    def _check_framing(self) -> None:
        """Bound what is no data, and is neither kept nor counted by whoever reads the body."""
        if self.num_unexplained <= MAX_HEADER_BYTES:
            return
        if self.num_unexplained - len(self.trailing_data[0]) > MAX_HEADER_BYTES:
            self._refuse(
                f"the sizes of the body's chunks have more than {MAX_HEADER_BYTES} bytes;"
                " send larger chunks, or a Content-Length"
            )

    def _refuse(self, why: str) -> NoReturn:
        self.refusal = why
        raise h11.RemoteProtocolError(why)


def _with_path(request: h11.Request) -> h11.Request:
    """A request with an absolute target, as proxies are sent, as one for this server.

    https://www.rfc-editor.org/rfc/rfc9112#section-3.2.2: its host replaces that of the header.
    Raises ValueError for one without a host.
    """
    target = urlsplit(request.target.decode("ascii"))
    if not target.hostname:
        raise ValueError("it has no host")
    path = (target.path or "/") + (f"?{target.query}" if target.query else "")
    headers = [(name, value) for name, value in request.headers if name != b"host"]
    return h11.Request(
        method=request.method,
        target=path,
        headers=[(b"host", target.netloc.encode()), *headers],
        http_version=request.http_version,
    )
