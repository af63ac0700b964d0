"""Start real ranks: N processes of one script, gloo between them, as a launcher would."""

from __future__ import annotations

import os
import resource
import secrets
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TIMEOUT_SECONDS = 300
PATIENCE_SECONDS = 20


def start_ranks(module: str, world: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """`python -m MODULE ARGUMENTS` as `world` ranks, stdout and stderr in one pipe each."""
    port = free_port()
    ranks = []
    for rank in range(world):
        env = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", module, *arguments],
                cwd=ROOT,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return ranks


def run_ranks(module: str, world: int, *arguments: str) -> None:
    """The same until all have ended; fails with the ranks' output.

    A rank that waits for one that has failed gets a moment to say so.
    """
    ranks = start_ranks(module, world, *arguments)
    with ThreadPoolExecutor(world) as readers:
        outputs = [readers.submit(rank.stdout.read) for rank in ranks if rank.stdout]
        end = time.monotonic() + TIMEOUT_SECONDS
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
            if any(rank.poll() for rank in ranks):
                end = min(end, time.monotonic() + PATIENCE_SECONDS)
            time.sleep(0.05)
        for rank in ranks:
            rank.kill()
    codes = [rank.wait() for rank in ranks]
    said = (f"--- rank {i}\n{output.result()}" for i, output in enumerate(outputs))
    assert codes == [0] * world, f"{codes} of {module} {arguments}\n" + "\n".join(said)


def start_cli(*arguments: str, **options: Any) -> subprocess.Popen[Any]:
    """`lbr-ds ARGUMENTS` in a process of its own, still running; options: of Popen."""
    return subprocess.Popen(
        [sys.executable, "-m", "lbr_ds", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def run_cli(*arguments: str, file_limit: int = -1, **env: str) -> subprocess.CompletedProcess[str]:
    """`lbr-ds ARGUMENTS` in a process of its own; the caller looks at returncode and stderr.

    file_limit: no file may grow beyond so many bytes, as on a full disk.
    """
    return subprocess.run(
        [sys.executable, "-m", "lbr_ds", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit)),
    )


def free_port() -> int:
    """A TCP port that nobody on this machine listens on.

    Below those that Linux gives to connections: one of these may be taken before a rank listens.
    """
    while True:
        with socket.socket() as probe:
            port = 20_000 + secrets.randbelow(12_000)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
