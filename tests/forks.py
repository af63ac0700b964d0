"""Start programs without waiting for torch: forks of a process that has imported the libraries.

A server imports what every rank imports, which takes seconds, and then only forks. Each fork gets
an environment, arguments, a working folder and files for its output of its own, runs one module as
`python -m` does, and ends as an interpreter ends. What libraries read from the environment when
they are imported is the server's; `fork` therefore refuses another environment (see `OWN`), and its
caller starts an interpreter instead. So it does where a library has started a thread in the server.

    done = fork("lbr_ds", ["plan", "demo"], dict(os.environ), out, out)
    code = done.wait()
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent
MODULES = ("lbr_ds.cli", "lbr_ds.training.loop", "lbr_ds.evaluation", "torch._dynamo")
# Read when a process runs and not when libraries are imported, so they may differ.
OWN = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
OWN |= {"PYTEST_CURRENT_TEST", "PYTEST_VERSION", "PYTEST_XDIST_WORKER"}
_ALONE = 5.0  # seconds after which a server with other threads gives up
_LENGTH = struct.Struct("!I")


class Fork:
    """A running fork. `poll` and `wait` return its exit code as those of `subprocess.Popen`."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.pid = int(json.loads(_receive(connection)))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        if self.returncode is None:
            with selectors.DefaultSelector() as ready:
                ready.register(self._connection, selectors.EVENT_READ)
                if ready.select(0):
                    self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code."""
        if self.returncode is None:
            self._connection.settimeout(timeout)
            self.returncode = int(json.loads(_receive(self._connection)))
            self._connection.close()
        return self.returncode

    def kill(self) -> None:
        """Kill it, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def fork(
    module: str,
    arguments: list[str],
    env: dict[str, str],
    stdout: IO[Any],
    stderr: IO[Any],
    *,
    server: int = 0,
    file_limit: int = -1,
    warn: bool = True,
) -> Fork | None:
    """Run `python -m MODULE ARGUMENTS`; None where only a new interpreter has the environment.

    Args:
        module: What to run.
        arguments: Its arguments.
        env: Its environment.
        stdout: A file for its output.
        stderr: Another, or the same.
        server: Which server forks. Each has a seed of its own for the order of sets.
        file_limit: No file may grow beyond so many bytes.
        warn: False: as with `-W ignore`.
    """
    plain = {**os.environ, "OMP_NUM_THREADS": "1"}
    base, path = _server(server, json.dumps(_foreign(plain), sort_keys=True))
    if _foreign(env) != base:
        return None
    connection = socket.socket(socket.AF_UNIX)
    request = {"module": module, "arguments": arguments, "env": env, "warn": warn}
    files = [stdout.fileno(), stderr.fileno()]
    try:
        connection.connect(path)
        socket.send_fds(connection, [b"f"], files)
        _send(connection, {**request, "file_limit": file_limit})
        return Fork(connection)
    except (ConnectionError, EOFError):  # the server has threads, so it does not serve
        connection.close()
        return None


def _foreign(env: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in OWN}


@functools.cache
def _server(number: int, env: str) -> tuple[dict[str, str], str]:
    """Start a server, once; return the environment that it was given and its address."""
    base: dict[str, str] = json.loads(env)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"\0lbr-ds-forks-{os.getpid()}-{number}-{len(_alive)}")
    listening.listen()
    ours, theirs = socket.socketpair()  # the server ends when this end is closed
    _alive.append(ours)
    numbers = [listening.fileno(), theirs.fileno()]
    command = [sys.executable, "-m", "tests.forks", *map(str, numbers)]
    process = subprocess.Popen(command, cwd=ROOT, env=base, pass_fds=numbers)
    atexit.register(process.wait)
    atexit.register(ours.close)
    name = listening.getsockname()
    listening.close()
    theirs.close()
    return base, name.decode() if isinstance(name, bytes) else name


_alive: list[socket.socket] = []


def _send(connection: socket.socket, value: Any) -> None:
    text = json.dumps(value).encode()
    connection.sendall(_LENGTH.pack(len(text)) + text)


def _receive(connection: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    return _exactly(connection, length)


def _exactly(connection: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        part = connection.recv(count - len(found))
        if not part:
            raise EOFError("the server of tests/forks.py has ended")
        found += part
    return found


class _Server:
    """Forks for every request until the parent has ended."""

    def __init__(self, listening: socket.socket, parent: socket.socket) -> None:
        self._listening, self._parent = listening, parent
        self._running: dict[int, tuple[int, socket.socket]] = {}  # pidfd -> pid and whom to tell
        self._ready = selectors.DefaultSelector()
        for one in (listening, parent):
            self._ready.register(one.fileno(), selectors.EVENT_READ)

    def serve(self) -> dict[str, Any]:
        """Return a request in the fork that is to answer it."""
        while True:
            for key, _ in self._ready.select():
                if key.fd == self._parent.fileno():
                    self._end()
                elif key.fd in self._running:
                    self._report(key.fd)
                elif (request := self._fork()) is not None:
                    return request

    def _end(self) -> None:
        for pid, _ in self._running.values():
            os.kill(pid, signal.SIGKILL)
        os._exit(0)

    def _fork(self) -> dict[str, Any] | None:
        """Accept a request and fork; None in the server."""
        connection, _ = self._listening.accept()
        _, files, _, _ = socket.recv_fds(connection, 1, 2)
        request: dict[str, Any] = json.loads(_receive(connection))
        if (pid := os.fork()) == 0:
            self._ready.close()
            for fd, (_, other) in self._running.items():
                os.close(fd)
                other.close()
            for one in (connection, self._listening, self._parent):
                one.close()
            return {**request, "files": files}
        for fd in files:
            os.close(fd)
        _send(connection, pid)
        self._running[fd := os.pidfd_open(pid)] = pid, connection
        self._ready.register(fd, selectors.EVENT_READ)
        return None

    def _report(self, fd: int) -> None:
        """Tell the exit code of a fork that has ended."""
        pid, connection = self._running.pop(fd)
        self._ready.unregister(fd)
        os.close(fd)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(OSError):  # nobody waits for it
            _send(connection, code)
        connection.close()


def _become(request: dict[str, Any]) -> None:
    """Take the place that the request describes."""
    for own, given in zip((1, 2), request["files"], strict=True):
        os.dup2(given, own)
        os.close(given)
    os.environ.clear()
    os.environ.update(request["env"])
    if request["file_limit"] >= 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
    if not request["warn"]:
        warnings.simplefilter("ignore")
    sys.argv[1:] = request["arguments"]
    gc.enable()


def main() -> None:
    """Import, serve, and run a module in each fork."""
    listening, parent = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
    gc.disable()
    for name in MODULES:
        importlib.import_module(name)
    gc.freeze()
    end = time.monotonic() + _ALONE
    while len(os.listdir("/proc/self/task")) > 1:  # a fork has only one of the threads
        if time.monotonic() > end:
            return
        time.sleep(0.05)
    request = _Server(listening, parent).serve()
    _become(request)
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
