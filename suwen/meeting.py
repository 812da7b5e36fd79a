"""Several machines that start one training: they meet at machine 0, compare notes, and notice when one is lost.

Each launcher keeps one TCP connection to machine 0 on the training's own port, until it ends. Messages are JSON lines;
an empty line says that the sender is alive. The standard library only: it runs before torch is loaded, and its errors
name a machine where a process group would wait half an hour.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

BEAT_SECONDS = 5.0
LOST_SECONDS = 20.0  # a machine that was silent for so long counts as lost
GOODBYE_SECONDS = 2.0
LARGEST_LINE = 1 << 22  # bytes


class Lost(ValueError):
    """Another machine cannot be reached, or is no longer there."""


class Link:
    """A connection to another machine that carries JSON values, a line each."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        self.connection, self.name, self.buffer = connection, name, b""
        self.unread: list[Any] = []
        self.writing = threading.Lock()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, value: Any) -> None:
        self._write(json.dumps(value).encode() + b"\n")

    def beat(self) -> None:
        self._write(b"\n")

    def _write(self, line: bytes) -> None:
        with self.writing:
            self.connection.settimeout(LOST_SECONDS)
            self.connection.sendall(line)

    def read(self) -> list[Any]:
        """The values that have arrived whole; waits for bytes. EOFError at the end of the connection."""
        if self.unread:  # came together with what `receive` gave
            values, self.unread = self.unread, []
            return values
        data = self.connection.recv(1 << 16)
        if not data:
            raise EOFError
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        if len(self.buffer) > LARGEST_LINE:
            raise EOFError
        return [json.loads(line) for line in lines if line]

    def finish(self, until: float) -> None:
        """End the connection when the other side has; a socket closed on unread bytes would take our last line back."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while (left := until - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(1 << 16):
                    break
        self.connection.close()

    def receive(self, until: float, step: str) -> Any:
        """The next value; Lost if it has not come by `until` (time.monotonic)."""
        while not self.unread:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self.connection], [], [], left)[0]:
                raise Lost(f"{self.name} gave no answer in time ({step})")
            try:
                self.unread += self.read()
            except (EOFError, OSError, ValueError):
                raise Lost(f"{self.name} broke off ({step}); see its own message") from None
        return self.unread.pop(0)


class Meeting:
    """The links of one machine: of machine 0 to all others, of the others to machine 0; none for a single machine."""

    def __init__(self, machine: int, links: dict[int, Link]) -> None:
        self.machine, self.links = machine, links
        self.ended = threading.Event()

    @property
    def local_address(self) -> str | None:
        """The address by which this machine reaches the others."""
        return next((link.connection.getsockname()[0] for link in self.links.values()), None)

    def exchange(self, value: Any, seconds: float, step: str) -> list[Any]:
        """The values of all machines, in their order, on every machine.

        Raises:
            Lost: names the machine that did not give its own within `seconds`, on every machine that still listens.
        """
        until = time.monotonic() + seconds
        if self.machine > 0:
            try:
                self.links[0].send(value)
            except OSError:
                raise Lost(f"{self.links[0].name} broke off ({step}); see its own message") from None
            # Machine 0 tells who is missing when its time is up: listen a little longer
            answer = self.links[0].receive(until + 5, step)
            if "lost" in answer:
                raise Lost(answer["lost"])
            return answer["values"]
        values = [value]
        try:
            values += [self.links[number].receive(until, step) for number in sorted(self.links)]
            self._tell({"values": values})
        except (Lost, OSError) as error:
            self._tell({"lost": str(error)})
            raise Lost(str(error)) from None
        return values

    def _tell(self, value: Any) -> None:
        for link in self.links.values():
            with contextlib.suppress(OSError):
                link.send(value)

    def watch(self, lost: Callable[[str, int], None]) -> None:
        """From now on call `lost(message, exit code)`, from a thread and once, when a machine is silent or fails."""
        if self.links:
            threading.Thread(target=self._watch, args=(lost,), name="meeting", daemon=True).start()

    def _watch(self, lost: Callable[[str, int], None]) -> None:
        heard = dict.fromkeys(self.links, time.monotonic())
        next_beat = 0.0
        while heard and not self.ended.is_set():
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + BEAT_SECONDS
                for number in heard:
                    with contextlib.suppress(OSError):  # reading will tell
                        self.links[number].beat()
            sockets = {self.links[number].connection: number for number in heard}
            problem, code = "", 1
            try:
                ready = select.select(list(sockets), [], [], BEAT_SECONDS / 5)[0]
            except (OSError, ValueError):
                return  # closed by this machine's own goodbye
            for connection in ready:
                number = sockets[connection]
                heard[number] = time.monotonic()
                try:
                    values = self.links[number].read()
                except (EOFError, OSError, ValueError):
                    problem = f"{self.links[number].name} broke off without a word"
                    break
                if (end := next((value for value in values if "end" in value), None)) is not None:
                    del heard[number]
                    self.links[number].connection.close()
                    problem, code = end["end"] and f"{self.links[number].name} {end['end']}", end["code"]
            silent = [number for number, when in heard.items() if time.monotonic() - when > LOST_SECONDS]
            if silent and not problem:
                problem = f"{self.links[silent[0]].name} has been silent for {LOST_SECONDS:.0f} s"
            if problem and not self.ended.is_set():
                self.close(f"ends because {problem}", code)
                lost(problem, code)
                return

    def close(self, problem: str = "", code: int = 0) -> None:
        """Say goodbye: `problem` is what went wrong here, empty for a good end."""
        if not self.ended.is_set():
            self.ended.set()
            self._tell({"end": problem, "code": code})
            until = time.monotonic() + GOODBYE_SECONDS
            for link in self.links.values():
                link.finish(until)


def meet(machines: int, machine: int, address: str, port: int, host: str, seconds: float) -> Meeting:
    """Connect all machines to machine 0, which listens on `address` and `port` until the last one is there.

    Args:
        host: name of this machine, for messages.
        seconds: how long to wait for the others.

    Raises:
        Lost: not all came in time; an address that is not machine 0's, or a port in use.
    """
    if machines == 1:
        return Meeting(machine, {})
    until = time.monotonic() + seconds
    return _receive_all(machines, address, port, until) if machine == 0 else _join(machine, address, port, host, until)


def _receive_all(machines: int, address: str, port: int, until: float) -> Meeting:
    try:
        host = socket.gethostbyname(address)
        # Debian gives a host's own name the address 127.0.1.1, at which nobody else could call
        server = socket.create_server(("" if host != address and host.startswith("127.") else host, port))
    except OSError as error:
        raise Lost(
            f"MAIN_PROCESS_IP={address}, MAIN_PROCESS_PORT={port}: machine 0 cannot listen there "
            f"({error.strerror or error}); expected an address of this machine and a free port"
        ) from None
    links: dict[int, Link] = {}
    print(f"preflight: waiting for {machines - 1} more machine(s) at {address}:{port}", file=sys.stderr, flush=True)
    with server:
        while len(links) < machines - 1:
            server.settimeout(max(until - time.monotonic(), 0.001))
            try:
                connection, (peer, *_) = server.accept()
                link = Link(connection, peer)
                said = link.receive(min(until, time.monotonic() + 10), "introduction")
                number, name = int(said["machine"]), f"machine {said['machine']} ({said['host']}, {peer})"
            except TimeoutError:
                missing = ", ".join(str(number) for number in range(1, machines) if number not in links)
                message = f"no sign of machine {missing} at {address}:{port} (waited for it to start)"
                Meeting(0, links)._tell({"lost": message})
                raise Lost(message) from None
            except (Lost, ValueError, KeyError, TypeError):
                connection.close()  # somebody else's connection
                continue
            link.name = name
            if not 0 < number < machines or number in links:
                message = f"{name}: MACHINE_RANK is {number}, expected 1 to {machines - 1}, another one on each machine"
                Meeting(0, {**links, -1: link})._tell({"lost": message})
                raise Lost(message)
            links[number] = link
    return Meeting(0, links)


def _join(machine: int, address: str, port: int, host: str, until: float) -> Meeting:
    problem = "timed out"
    while (left := until - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((address, port), timeout=min(left, 10))
        except OSError as error:  # not there yet, perhaps
            problem = error.strerror or str(error)
            time.sleep(min(0.5, max(left, 0)))
            continue
        link = Link(connection, f"machine 0 ({address})")
        link.send({"machine": machine, "host": host})
        return Meeting(machine, {0: link})
    raise Lost(f"machine 0 cannot be reached at MAIN_PROCESS_IP={address}, port {port} ({problem})")
