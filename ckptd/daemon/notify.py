"""systemd's readiness protocol: one datagram to `$NOTIFY_SOCKET`, nothing when there is none (see sd_notify(3))."""

from __future__ import annotations

import os
import socket


def notify(state: str) -> None:
    """Tell systemd; a service manager that doesn't listen is no reason to fail."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    name = "\0" + address[1:] if address.startswith("@") else address
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as stream:
        try:
            stream.sendto(state.encode(), name)
        except OSError:
            return
