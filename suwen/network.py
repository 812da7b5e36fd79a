"""Addresses that servers listen on, and whether the model hub answers."""

from __future__ import annotations

import functools
import ipaddress
import os
import socket


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_address(host: str, port: int) -> None:
    """Try the address before the model loads, which can take minutes."""
    if not 0 < port < 65536:
        raise ValueError(f"--port: found {port}, expected 1 to 65535")
    try:
        [(family, kind, _, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {error.strerror or error}, expected a free address") from None


@functools.cache
def ask_hub() -> None:
    """Ask once whether the model hub answers; where it does not, only what was downloaded before is looked at.

    Its client would wait half a minute for each file, those that are here included.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    from suwen.progress import say
    from suwen.readers import first_line

    if constants.is_offline_mode():
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # of the library that its client asks with, which is not ours to know
        say(f"note: {constants.ENDPOINT} cannot be reached ({first_line(error)}): only downloaded models can be read")
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # read by PEFT, and by processes that are started from here
