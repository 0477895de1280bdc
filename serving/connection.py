"""HTTP on the socket: uvicorn's protocol, with bounds on what a stranger may send before a body."""

import asyncio
import socket
from collections import OrderedDict
from typing import Any
from weakref import WeakKeyDictionary

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from serving.connection_limits import Flow, Turns, max_waiting
from serving.request_parser import MAX_HEADER_BYTES, RequestParser

# Most seconds for what precedes the body.
HEADER_TIMEOUT = 30.0
# Longer than clients and load balancers reuse idle connections, commonly 5 and 60 seconds; whoever
# reuses one at the moment in which it is closed is told of a reset connection.
KEEP_ALIVE = 75
# Most seconds in which a client may take nothing of an answer; as nginx's send_timeout.
SEND_TIMEOUT = 60.0
# Seconds until the second byte is sent to a client that may be gone; then thrice as long for each.
_PROBE_AFTER = 0.02


# Of each server the connections that wait for their client, first who has waited longest.
WAITING: WeakKeyDictionary[ServerState, OrderedDict["Connection", None]] = WeakKeyDictionary()


class Connection(H11Protocol):
    """uvicorn's protocol, with bounds on the time that a client may take to ask, and to read.

    A timer runs while no request is being answered, and closes the connection at its end.
    A body is read piece by piece, each once the application asks for it.

    A client that closes its sending side only is answered still. By TCP it looks like one that has
    hung up, until something is sent: then the latter's system resets the connection. So the bytes
    with which all answers begin are sent one by one, as long as there is no answer.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.conn: RequestParser
        # h11 bounds with it whatever comes in lines: headers, trailers, and sizes of chunks.
        self.conn = RequestParser(h11.SERVER, MAX_HEADER_BYTES)
        self.waiting = WAITING.setdefault(self.server_state, OrderedDict())
        self.turns = Turns.of(self.server_state)
        self.turn: asyncio.TimerHandle | None = None  # to read further chunks
        self.has_begun = False  # some of the next request's bytes have come
        self.at_eof = False  # the client sends nothing more
        self.probe: asyncio.TimerHandle | None = None
        self.stall: asyncio.TimerHandle | None = None  # while the client takes nothing

    @property
    def is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def num_pending(self) -> int:
        """Bytes that are not parsed yet."""
        return len(self.conn.trailing_data[0])

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow: Flow = Flow(transport)
        self.timer = self.loop.call_later(HEADER_TIMEOUT, transport.close)
        self.waiting[self] = None
        if len(self.waiting) > max_waiting(num_answering=len(self.server_state.tasks)):
            oldest, _ = self.waiting.popitem(last=False)
            oldest.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.IDLE and not self.num_pending:
            # HTTP allows blank lines before a request, and h11 does not.
            data = data.lstrip(b"\r\n")
        if data:
            super().data_received(data)
        self._set_timer()
        if self.is_answering and self.cycle.more_body and self.cycle.body:
            self.flow.pause_reading()  # until the application asks for more
        self._go_on_reading()

    def handle_events(self) -> None:
        """Handle what has come; of many small chunks some, and the others in turns to come."""
        begun = self.loop.time()
        super().handle_events()
        now = self.loop.time()
        if not self.conn.has_more_chunks or self.flow.held or self.transport.is_closing():
            return
        self.flow.pause_reading()
        self.flow.held = True
        self.turn = self.loop.call_at(self.turns.next(now, now - begun), self._read_on)

    def on_response_complete(self) -> None:
        self.has_begun = False
        self.waiting[self] = None
        self.waiting.move_to_end(self)
        self._restart_timer(KEEP_ALIVE)
        super().on_response_complete()
        # Of two timers: uvicorn's is cancelled by any byte, even one that begins no request.
        self._unset_keepalive_if_required()
        self._set_timer()
        if self.at_eof and not self._owes_an_answer:
            self.transport.close()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection open if a whole request is to be answered."""
        if self._owes_an_answer and not self.at_eof:
            self.at_eof = True
            self._probe(_PROBE_AFTER)
        return self._owes_an_answer

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        if self.stall:
            self.stall.cancel()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self.timer.cancel()
        self.waiting.pop(self, None)
        for timer in filter(None, (self.stall, self.probe, self.turn)):
            timer.cancel()
        super().connection_lost(exc)

    def _should_upgrade(self) -> bool:
        return False  # without uvicorn's warning: Java's client offers HTTP/2 each time

    def send_400_response(self, msg: str) -> None:
        msg = self.conn.refusal or msg
        # uvicorn would send it into an answer that has begun, and an answer after it.
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()
        if self.is_answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _read_on(self) -> None:
        """Read further chunks of those that have come, and further bytes once there are none."""
        self.flow.held = False
        self.conn.go_on()
        self.handle_events()
        self._set_timer()
        if not self.flow.held:
            self.flow.resume_reading()

    @property
    def _owes_an_answer(self) -> bool:
        """Whether a request is being answered of which nothing is to come any more."""
        return self.is_answering and not self.cycle.more_body

    def _probe(self, seconds: float) -> None:
        """Send a byte of the answer now and then, and abort the connection once it is reset."""
        peer = self.transport.get_extra_info("socket")
        if self.transport.is_closing():
            return
        if peer.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
            return
        self.transport.write(self.conn.begin_answer())
        self.probe = self.loop.call_later(seconds, self._probe, min(3 * seconds, 60))

    def _wait_for_reader(self, left: int = -1) -> None:
        """Abort the connection of a client that takes nothing: what it does not read is kept.

        `left` bytes were to be sent before; while there are too many, nothing is added.
        """
        size = self.transport.get_write_buffer_size()
        if size == left:
            self.transport.abort()
        else:
            self.stall = self.loop.call_later(SEND_TIMEOUT, self._wait_for_reader, size)

    def _set_timer(self) -> None:
        """Stop the timer while a request is answered; restart it when one begins."""
        if self._owes_an_answer:
            self.waiting.pop(self, None)
        if self.is_answering:
            self.timer.cancel()
        elif self.conn.their_state is h11.IDLE and self.num_pending and not self.has_begun:
            self.has_begun = True
            self._restart_timer(HEADER_TIMEOUT)

    def _restart_timer(self, seconds: float) -> None:
        self.timer.cancel()
        self.timer = self.loop.call_later(seconds, self.transport.close)

    def _go_on_reading(self) -> None:
        """Read while a request is answered, so that a client that hangs up is noticed.

        uvicorn would stop at the first bytes of a pipelined request.
        """
        if not self.is_answering or self.conn.their_state is not h11.DONE:
            return
        if self.num_pending > MAX_HEADER_BYTES:
            self.transport.close()
        elif self.num_pending:
            self.flow.resume_reading()
