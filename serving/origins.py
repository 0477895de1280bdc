"""Which web page a request comes from, and by which name the server was asked for.

A browser lets any page send requests to any server that it reaches, one on the user's own machine
too; the page cannot read the answer, but the work is done. And a page whose name comes to mean
127.0.0.1 (DNS rebinding) is of the same origin then, and reads all.
https://fetch.spec.whatwg.org/#origin-header, https://www.w3.org/TR/fetch-metadata
"""

import ipaddress
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers

# What Sec-Fetch-Site says of the server's own pages, and of what no page began.
_OWN = ("same-origin", "none")
# Top-level names that nobody can register, and those of a cluster or a local network end in.
_LOCAL = ("localhost", "local", "internal")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def foreign_origin(headers: Headers, method: str, named: tuple[str, ...]) -> str | None:
    """The origin of the foreign page that a request comes from; None if it is none, or `named`.

    Following a link is no such request, nor are programs', which send none of these headers.
    """
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if "*" in named or (origin is not None and normalised(origin) in named):
        return None
    # A proxy may have changed the Host, so the browser's own word goes first.
    is_own = origin is None or _is_of_host(origin, headers) if site is None else site in _OWN
    if is_own or (origin is None and method in ("GET", "HEAD")):
        return None
    return origin or "another site"


def _is_of_host(origin: str, headers: Headers) -> bool:
    """Whether an origin is the server's own, by a name that a foreign page cannot set."""
    scheme, _, place = normalised(origin).partition("://")
    names = (headers.get("host", ""), headers.get("x-forwarded-host", ""))
    hosts = (name.lower().removesuffix(_DEFAULT_PORTS.get(scheme, "")) for name in names)
    return bool(place) and place in hosts


def unknown_host(headers: Headers, named: tuple[str, ...]) -> str | None:
    """The name in a request's Host that a foreign page could have; None if it has none.

    Those are no addresses, not those of LOCAL, of one part, or this machine's, and not `named`.
    """
    name = host_of(headers.get("host", ""))
    is_local = "." not in name or name.rpartition(".")[2] in _LOCAL
    if is_local or _is_address(name) or "*" in named or name in named:
        return None
    return None if name == socket.gethostname().lower() else name


def normalised(origin: str) -> str:
    """An origin as browsers send it: in small letters, without the port that its scheme has."""
    origin = origin.strip().lower().rstrip("/")
    return origin.removesuffix(_DEFAULT_PORTS.get(origin.partition("://")[0], ""))


def host_of(place: str) -> str:
    """The host of `host:port`, or of an origin, in small letters."""
    try:
        name = urlsplit(place if "://" in place else f"//{place}").hostname
    except ValueError:  # brackets around what is no address
        return place.lower()
    return (name or "").removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True
