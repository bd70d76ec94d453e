"""Listening sockets for frontends: loopback unless protected, bound before the model loads."""

import ipaddress
import socket

from qlorachat.errors import AddressError, ConfigError


def listen(host: str, port: int, *, protected: bool, frontend: str) -> socket.socket:
    """A listening TCP socket on `host`:`port` (0: any free port).

    `protected` says whether callers must show a key or password; without it only a loopback
    address is allowed (ConfigError). A port in use is an AddressError that names the frontend.
    """
    if not protected and not is_loopback(host):
        raise ConfigError(
            f"The frontend {frontend} would listen on {host} for anyone: set a key, or listen on "
            "127.0.0.1.",
            param="host",
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    try:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows: refuse to share a port with another
            server.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, port))
        server.listen(128)
    except (OSError, OverflowError) as error:
        server.close()
        raise AddressError(
            f"The frontend {frontend} can't listen on {host}:{port} "
            f"({getattr(error, 'strerror', None) or error}): end what uses the port, or choose "
            "another with --port."
        ) from None
    return server


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
