"""A port for a daemon that is told one before it listens."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """Below those that the kernel gives to connections (ip(7), ip_local_port_range): no other test gets it by chance."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
