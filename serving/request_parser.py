"""HTTP/1.1 as bytes: h11's parser, stricter, and able to begin an answer before it is known."""

from typing import Any

import h11

BEGINNING = b"HTTP/1.1 "


class RequestParser(h11.Connection):
    """h11's, but a request that states its body's length in two ways is refused.

    A proxy before us could take the other one, and what lies between for a second request.
    """

    num_begun = 0  # bytes of the next answer that are sent already

    def begin_answer(self) -> bytes:
        """The next byte with which an answer begins, whatever it will be; none if it has begun."""
        if self.our_state is not h11.SEND_RESPONSE or self.num_begun == len(BEGINNING):
            return b""
        self.num_begun += 1
        return BEGINNING[self.num_begun - 1 : self.num_begun]

    def send(self, event: Any) -> Any:
        """The bytes of an event, without those that are sent already."""
        data = super().send(event)
        if data and self.num_begun:
            data = data[self.num_begun :]
            self.num_begun = 0
        return data

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = {name for name, _ in event.headers}
            if {b"content-length", b"transfer-encoding"} <= names:
                raise h11.RemoteProtocolError("Content-Length and Transfer-Encoding")
        return event
