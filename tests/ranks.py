"""Start real ranks: N processes of one script, gloo between them, as a launcher would."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TIMEOUT_SECONDS = 300


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
    """The same until all have ended; fails with the ranks' output."""
    ranks = start_ranks(module, world, *arguments)
    try:
        outputs = [process.communicate(timeout=TIMEOUT_SECONDS)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    codes = [process.returncode for process in ranks]
    assert codes == [0] * world, "\n".join(f"--- rank {i}\n{o}" for i, o in enumerate(outputs))


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
    """A TCP port that nobody on this machine listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
