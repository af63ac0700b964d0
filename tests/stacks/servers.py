"""Start a server of embeddings in an installation of its own, and end it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.stacks.environments import Installed

_PATIENCE = 300  # seconds until a server must answer; imports and graph building take a minute


@contextlib.contextmanager
def serving(
    installed: Installed, log: Path, *arguments: str, health: str, **variables: str
) -> Iterator[str]:
    """Run `python ARGUMENTS` with {port} filled in until it answers; yield its base URL.

    Args:
        installed: The interpreter that runs the server.
        log: The file that receives the server's output; shown when it does not start.
        arguments: Of the interpreter; "{port}" becomes a free port.
        health: The path that answers 200 once the model is loaded.
        variables: Environment variables of the server.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(installed.python), *(a.format(port=port) for a in arguments)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**installed.environment(), **variables},
        )
        base = f"http://127.0.0.1:{port}"
        try:
            _wait(process, f"{base}{health}", log)
            yield base
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait until the server answers; fail with the end of its log when it ends before that."""
    began = time.monotonic()
    while time.monotonic() - began < _PATIENCE:
        if process.poll() is not None:
            break
        with (
            contextlib.suppress(urllib.error.URLError, OSError),
            urllib.request.urlopen(url, timeout=5) as answer,
        ):
            if answer.status == 200:
                return
        time.sleep(0.5)
    raise AssertionError(f"the server did not start:\n{log.read_text()[-3000:]}")
