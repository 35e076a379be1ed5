"""Names, addresses and who may be connected to: what is decided on is what is dialled."""

from __future__ import annotations

import errno
import ipaddress
import socket
import threading
import time

import pytest
from agentd_sandbox.network import Network, canonical_host, is_public, loopback_pair, peer, split_authority, split_url
from hypothesis import given
from hypothesis import strategies as st

NEVER = threading.Event()


def network(*granted: tuple[str, int], answers: list[list[str]] | None = None, seconds: float = 5) -> tuple[Network, list[str]]:
    """With a resolver that gives the answers one after another, and notes what it was asked."""
    asked: list[str] = []
    left = list(answers or [])

    def resolve(name: str) -> list[str]:
        asked.append(name)
        if not left:
            raise OSError(errno.ENOENT, "unknown")
        return left.pop(0)

    return Network(frozenset(granted), time.monotonic() + seconds, threading.Event(), resolve), asked


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("example.org", "example.org"),
        ("EXAMPLE.org.", "example.org"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("localhost", "localhost"),
        ("127.0.0.1", "127.0.0.1"),
        ("[::1]", "::1"),
        ("[2001:DB8::1]", "2001:db8::1"),
        ("[::ffff:10.0.0.1]", "10.0.0.1"),
        ("1e100.net", "1e100.net"),
    ],
)
def test_a_host_has_one_form(text: str, host: str):
    """Case, a dot at the end, and IPv4 within IPv6 make no difference."""
    assert canonical_host(text) == host


@pytest.mark.parametrize(
    "text",
    [
        *("2130706433", "0x7f.1", "017700000001", "127.1", "0177.0.0.1", "127.0.0.1.", "1.2.3.4.5", "127.0.0.0x1", "1.2.3.256"),
        *(
            "evil\0.example.org",
            "a b",
            "a\tb",
            "a\r\nb",
            "",
            ".",
            "..",
            "a..b",
            "-a.b",
            "a-.b",
            "a_b.c",
            "user@host",
            "host:80",
        ),
        *(
            "bücher.example",
            "\uff11\uff12\uff17.0.0.1",
            "example。org",
            "exámple",
            "[127.0.0.1]",
            "[fe80::1%eth0]",
            "[::1",
            "::1]",
            "[example.org]",
        ),
        *("a" * 64 + ".b", ".".join(["abc"] * 70), "example.org..", "/", "example.org/", "example.org#", "example.org?x"),
    ],
)
def test_what_parsers_read_differently_is_no_host(text: str):
    """Numbers of other forms, controls, userinfo, other scripts, empty and over-long labels."""
    assert canonical_host(text) is None


@given(st.text(max_size=40))
def test_the_form_of_a_host_is_stable(text: str):
    """Whatever comes in: no host, or a form that stays the same and is plain ASCII."""
    host = canonical_host(text)
    if host is not None:
        again = f"[{host}]" if ":" in host else host
        assert canonical_host(again) == host
        assert host.isascii()
        assert not set(host) & set("\0\r\n\t @/#?\\")


@pytest.mark.parametrize(
    "text", ["h:0", "h:65536", "h:+80", "h: 80", "h:80 ", "h:", "h:8x", ":80", "h:80:80", "[::1]80", "h:٨٠"]
)
def test_a_port_is_a_number_that_there_is(text: str):
    """In ASCII digits, from 1 to 65535."""
    with pytest.raises(ValueError, match="host"):
        split_authority(text, None)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("http://a.b", ("http", "a.b", 80, "/")),
        ("HTTPS://A.b/x?y=z", ("https", "a.b", 443, "/x?y=z")),
        ("http://a.b:8080?q", ("http", "a.b", 8080, "/?q")),
        ("https://[::1]:8443/x", ("https", "::1", 8443, "/x")),
    ],
)
def test_an_address_of_the_web_is_taken_apart(text: str, parts: tuple[str, str, int, str]):
    """Scheme, host, port, path; written out again it is the same address."""
    url = split_url(text)
    assert (url.scheme, url.host, url.port, url.path) == parts
    assert split_url(str(url)) == url


@pytest.mark.parametrize(
    "text",
    [
        *("ftp://a/", "file:///etc/passwd", "//a/", "http:/a", "http://", "http://user@a/", "http://user:pw@a/", "http://a/#f"),
        *(
            "http://a\\@b/",
            "http://a/\\..",
            "http://a b/",
            "http://a/\r\nX: y",
            "http://a/\0",
            "http://a:b/",
            "http://a/ü",
            "javascript:x",
        ),
    ],
)
def test_an_address_that_could_be_read_in_two_ways_is_refused(text: str):
    """No userinfo, fragment, backslash, control, space or other script."""
    with pytest.raises(ValueError, match=r".+"):
        split_url(text)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1"),
        *("255.255.255.255", "198.18.0.1", "192.0.2.1", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:10.0.0.1"),
        *("64:ff9b::7f00:1", "64:ff9b:1::1", "2002:7f00:1::", "2001:0:1::1", "2001:db8::1", "3fff::1", "5f00::1"),
        *("fec0::1", "::7f00:1", "::10.0.0.1", "::ffff:0:10.0.0.1", "100::1", "2620:4f:8000::1", "192.88.99.1", "240.0.0.1"),
    ],
)
def test_private_addresses_are_known(address: str):
    """Loopback, link-local with the clouds' metadata, translators of them, and all else that is not the internet."""
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "2a00:1450::1", "2001:4860::8888"])
def test_public_addresses_are_known(address: str):
    """The control."""
    assert is_public(address)


@given(st.ip_addresses(v=4), st.integers(1, 65535))
def test_a_sockaddr_is_read_as_the_kernel_does(address: ipaddress.IPv4Address, port: int):
    """In its own form and within IPv6."""
    tail = port.to_bytes(2, "big")
    plain = socket.AF_INET.to_bytes(2, "little") + tail + address.packed + bytes(8)
    within = socket.AF_INET6.to_bytes(2, "little") + tail + bytes(4) + bytes(10) + b"\xff\xff" + address.packed + bytes(4)
    assert peer(plain) == peer(within) == (str(address), port)


@given(st.binary(max_size=128))
def test_no_sockaddr_is_more_than_an_error(raw: bytes):
    """Short, long, of any family."""
    try:
        host, port = peer(raw + b"\0\0" if len(raw) < 2 else raw)
    except OSError:
        return
    assert ipaddress.ip_address(host)
    assert 0 <= port < 65536


def test_a_name_has_a_made_up_address_and_it_means_the_name():
    """The hosts file tells it; nothing is resolved for that."""
    peers, asked = network(("b.example", 443), ("a.example", 80), ("127.0.0.1", 5))
    made_up = peers.made_up_addresses
    assert set(made_up) == {"a.example", "b.example"}
    assert all(not is_public(address) for address in made_up.values())
    assert f"{made_up['a.example']} a.example\n".encode() in peers.made_up_files()[b"/etc/hosts"]
    assert peers.meant(made_up["a.example"], 80) == ("a.example", 80)
    assert peers.meant("198.18.77.7", 80) == ("198.18.77.7", 80)
    assert asked == []


@pytest.mark.parametrize("wanted", [("a.example", 81), ("b.example", 80), ("127.0.0.1", 80)])
def test_what_is_not_granted_is_neither_resolved_nor_connected_to(wanted: tuple[str, int]):
    """Host and port have to be the granted ones."""
    peers, asked = network(("a.example", 80), answers=[["1.1.1.1"]])
    with pytest.raises(PermissionError):
        peers.dial(*wanted)
    assert asked == []


def test_a_private_address_that_a_name_leads_to_is_granted_with_its_port_or_not_at_all():
    """One that is granted for another port is none that the name may lead to."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        peers, _ = network(("a.example", port), ("127.0.0.1", port + 1), answers=[["127.0.0.1"]])
        with pytest.raises(PermissionError, match=f"not granted with port {port}"):
            peers.dial("a.example", port)
        peers, _ = network(("a.example", port), ("127.0.0.1", port), answers=[["127.0.0.1"]])
        peers.dial("a.example", port).close()


@pytest.mark.parametrize("answer", [["127.0.0.1"], ["169.254.169.254"], ["10.0.0.1", "::1"], ["::ffff:127.0.0.1"]])
def test_a_name_that_leads_to_private_addresses_is_refused(answer: list[str]):
    """Unless the address itself is granted."""
    peers, _ = network(("a.example", 80), answers=[answer])
    with pytest.raises(PermissionError, match="private"):
        peers.dial("a.example", 80)


def test_what_a_name_leads_to_is_pinned_for_the_call():
    """A resolver that changes its mind (DNS rebinding) is not asked again."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        peers, asked = network(("a.example", port), ("127.0.0.1", port), answers=[["127.0.0.1"], ["10.0.0.1"]])
        for _ in range(3):
            peers.dial("a.example", port).close()
    assert asked == ["a.example"]
    (contact,) = peers.traffic.contacts()
    assert (contact.host, contact.port, contact.connections) == ("a.example", port, 3)


def test_of_mixed_answers_only_public_and_granted_ones_are_tried():
    """The private one in between is left out."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        peers, _ = network(("a.example", port), ("127.0.0.1", port), answers=[["10.255.255.1", "127.0.0.1"]], seconds=3)
        start = time.monotonic()
        peers.dial("a.example", port).close()
        assert time.monotonic() - start < 2


def test_a_name_that_nobody_knows_is_unreachable():
    """And a peer that refuses is refused."""
    peers, _ = network(("a.example", 80), ("127.0.0.1", 1))
    with pytest.raises(OSError, match="resolved"):
        peers.dial("a.example", 80)
    with pytest.raises(ConnectionRefusedError):
        peers.dial("127.0.0.1", 1)


def test_a_peer_that_never_answers_is_given_up_at_the_deadline():
    """Or at once when the call ends."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        address = ("127.0.0.1", server.getsockname()[1])
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        peers, _ = network(address, seconds=0.3)
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            peers.dial(*address)
        peers, _ = network(address, seconds=30)
        threading.Timer(0.2, peers.stopped.set).start()
        with pytest.raises(TimeoutError):
            peers.dial(*address)
        assert time.monotonic() - start < 5
        for filler in fillers:
            filler.close()


def test_a_loopback_pair_is_one_connection():
    """With nobody else on it."""
    one, other = loopback_pair()
    with one, other:
        one.sendall(b"hello")
        assert other.recv(16) == b"hello"
        assert one.getpeername() == other.getsockname()
