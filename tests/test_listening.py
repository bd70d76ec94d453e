"""Sockets for frontends: loopback unless protected, and a busy port is one clear error."""

import socket

import pytest

from qlorachat.errors import AddressError, ConfigError
from qlorachat.listening import is_loopback, listen


def test_a_free_port_is_bound_and_a_taken_one_is_named() -> None:
    with listen("127.0.0.1", 0, protected=False, frontend="http") as server:
        port = server.getsockname()[1]
        with pytest.raises(AddressError, match=f"http can't listen on 127.0.0.1:{port}") as caught:
            listen("127.0.0.1", port, protected=False, frontend="http")
        assert caught.value.exit_code == 4


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_beyond_loopback_a_key_is_needed(host: str) -> None:
    with pytest.raises(ConfigError, match="set a key"):
        listen(host, 0, protected=False, frontend="http")


def test_with_a_key_every_address_may_be_used() -> None:
    with listen("0.0.0.0", 0, protected=True, frontend="http") as server:
        assert server.type == socket.SOCK_STREAM


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_cannot_be_is_an_error(port: int) -> None:
    with pytest.raises(AddressError):
        listen("127.0.0.1", port, protected=False, frontend="http")


def test_loopback_addresses() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.9.9.9", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "10.0.0.1", "localhost.evil.example", ""]))
