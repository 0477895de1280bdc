"""What is read of a request's bytes: the same however they come, and bounded in number."""

from itertools import pairwise

import h11
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serving.request_parser import CHUNKS_AT_ONCE, MAX_HEADER_BYTES, MAX_HEADERS, RequestParser

CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
REFUSED = h11.RemoteProtocolError


def events(*pieces: bytes) -> list[object]:
    """All events of what comes in these pieces, going on whenever it was enough for once."""
    parser, found = RequestParser(h11.SERVER, MAX_HEADER_BYTES), []
    for piece in pieces:
        parser.receive_data(piece)
        while True:
            event = parser.next_event()
            if event in (h11.NEED_DATA, h11.PAUSED):
                if not parser.has_more_chunks:
                    break
                parser.go_on()
            else:
                found.append(event)
    return found


def body_of(found: list[object]) -> bytes:
    assert isinstance(found[-1], h11.EndOfMessage)
    return b"".join(bytes(event.data) for event in found if isinstance(event, h11.Data))


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%s\r\n%s\r\n" % (len(data), extension, data)


def cut(text: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({0, len(text), *(at % (len(text) + 1) for at in places)})
    return [text[a:b] for a, b in pairwise(ends)]


# Bytes that look like the end of a body, or like trailers.
TEXTS = st.lists(st.sampled_from([b"0\r\n", b"\r\n0\r\n\r\n", b"a: b\r\n" * 200, b"x", b"\n"]))


@given(
    data=st.lists(TEXTS.map(b"".join).filter(bool), max_size=8),
    extension=st.sampled_from([b"", b";a", b";a=b", b" ;0"]),
    zeros=st.sampled_from([b"0", b"000", b"0;x=y"]),
    trailers=st.integers(0, 3),
    places=st.lists(st.integers(0, 10_000), max_size=12),
)
@example(data=[b"0\r\n" + b"a: b\r\n" * 200], extension=b"", zeros=b"0", trailers=0, places=[61])
def test_chunks_wherever_they_are_cut(data, extension, zeros, trailers, places):
    framed = b"".join(chunk(each, extension.strip(b" ")) for each in data)
    end = zeros + b"\r\n" + b"a: b\r\n" * trailers + b"\r\n"
    found = events(*cut(CHUNKED + framed + end, places))
    assert body_of(found) == b"".join(data)
    assert len(found[-1].headers) == trailers


@given(data=TEXTS.map(b"".join), places=st.lists(st.integers(0, 10_000), max_size=12))
def test_body_with_a_length(data, places):
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data)
    assert body_of(events(*cut(head + data, places))) == data


def test_so_many_chunks_at_once():
    parser = RequestParser(h11.SERVER, MAX_HEADER_BYTES)
    parser.receive_data(CHUNKED + chunk(b"x") * (3 * CHUNKS_AT_ONCE))
    assert isinstance(parser.next_event(), h11.Request)
    for _ in range(3):
        for _ in range(CHUNKS_AT_ONCE):
            assert isinstance(parser.next_event(), h11.Data)
        assert parser.next_event() is h11.NEED_DATA
        assert parser.has_more_chunks
        parser.go_on()
    assert parser.next_event() is h11.NEED_DATA
    assert not parser.has_more_chunks


ONE_BYTE = len(chunk(b"x")) - 1


@pytest.mark.parametrize("piece", [1000, 2**20])
@pytest.mark.parametrize("extension", [b"", b";a=bcdefgh"])
def test_framing_at_its_bound(extension, piece):
    framing = ONE_BYTE + len(extension)
    most = (MAX_HEADER_BYTES - len(b"0\r\n\r\n")) // framing
    text = CHUNKED + chunk(b"x", extension) * most + b"0\r\n\r\n"
    assert body_of(events(*cut(text, [*range(0, len(text), piece)]))) == b"x" * most
    text = CHUNKED + chunk(b"x", extension) * (most + 2 * CHUNKS_AT_ONCE)
    with pytest.raises(REFUSED, match="larger chunks, or a Content-Length"):
        events(*cut(text, [*range(0, len(text), piece)]))


def test_framing_of_large_chunks():
    """Eight megabytes in chunks of a kilobyte, the smallest in which so many are taken."""
    assert len(body_of(events(CHUNKED, *[chunk(b"x" * 1024)] * 8191, b"0\r\n\r\n"))) == 8191 * 1024


@pytest.mark.parametrize("end", [b"\r\n", b"\n"])
@pytest.mark.parametrize("pieces", [1, 3])
def test_headers_at_their_bound(pieces, end):
    def text(count: int) -> list[bytes]:
        lines = b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a:b\r\n" * (count - 1)
        return cut(lines + end, [*range(0, len(lines), len(lines) // pieces + 1)])

    assert len(events(*text(MAX_HEADERS))[0].headers) == MAX_HEADERS
    for more in (1, 12_900):
        with pytest.raises(REFUSED, match=f"more than {MAX_HEADERS} headers"):
            events(*text(MAX_HEADERS + more))


def test_head_at_its_bound():
    """Also one that comes at once, with what follows it."""
    fixed = b"GET / HTTP/1.1\r\nHost: x\r\na: \r\n\r\n"
    for more, is_taken in ((0, True), (1, False)):
        long = b"x" * (MAX_HEADER_BYTES - len(fixed) + more)
        text = fixed.replace(b"a: ", b"a: " + long)
        if is_taken:
            assert isinstance(events(text + text)[0], h11.Request)
        else:
            with pytest.raises(REFUSED, match="headers have more than"):
                events(text + text)


@pytest.mark.parametrize("begin", [b"0\r\n", b"1\r\nx\r\n0\r\n", b"1\r\nx\r\n0;x=y\r\n"])
@pytest.mark.parametrize("at_once", [True, False])
def test_trailers_at_their_bound(begin, at_once):
    def pieces(count: int) -> list[bytes]:
        text = CHUNKED + begin + b"a:b\r\n" * count + b"\r\n"
        return [text] if at_once else cut(text, [*range(0, len(text), 70)])

    # The blank line counts, where it has come.
    assert len(events(*pieces(MAX_HEADERS - 1))[-1].headers) == MAX_HEADERS - 1
    with pytest.raises(REFUSED, match=f"more than {MAX_HEADERS} trailers"):
        events(*pieces(MAX_HEADERS + 1))


def test_pipelined_requests_have_headers_of_their_own():
    text = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    assert len(text * MAX_HEADERS) > MAX_HEADERS
    assert len(events(text * MAX_HEADERS)) == 2  # the first one, and its end


@pytest.mark.parametrize(
    ("target", "path", "host"),
    [
        (b"http://a:80/health?x=%20", b"/health?x=%20", b"a:80"),
        (b"HTTPS://a/", b"/", b"a"),
        (b"http://a", b"/", b"a"),
        (b"http://[::1]:6006//b", b"//b", b"[::1]:6006"),
        (b"/http://a/", b"/http://a/", b"x"),
        (b"*", b"*", b"x"),
    ],
)
def test_absolute_targets(target, path, host):
    (request, _) = events(b"GET %s HTTP/1.1\r\nHost: x\r\nb: c\r\n\r\n" % target)
    assert request.target == path
    assert dict(request.headers) == {b"host": host, b"b": b"c"}


@pytest.mark.parametrize("target", [b"http://", b"http:///x", b"http://[::1/x", b"https://:80/"])
def test_absolute_targets_without_a_host(target):
    with pytest.raises(REFUSED, match="target is no URL"):
        events(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % target)
