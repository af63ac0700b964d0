"""Start real ranks: N processes of one script, gloo between them, as a launcher would."""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from tests.forks import Fork, fork

ROOT = Path(__file__).parent.parent
TIMEOUT_SECONDS = 900  # a program that takes so long hangs, on a slow machine too
PATIENCE_SECONDS = 20


def rank_environments(world: int) -> list[dict[str, str]]:
    """The environment of each rank, as a launcher would set it."""
    shared = {
        **os.environ,
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def start_ranks(module: str, world: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """`python -m MODULE ARGUMENTS` as `world` ranks, stdout and stderr in one pipe each."""
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module, *arguments],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for env in rank_environments(world)
    ]


def run_ranks(module: str, world: int, *arguments: str) -> str:
    """The same as forks (`tests/forks.py`), until all have ended; returns what they printed.

    It fails with that if a rank fails; one that waits for it gets a moment to say so.
    """
    codes, said = ended_ranks(module, world, *arguments, servers=2)
    whole = "\n".join(f"--- rank {rank}\n{one}" for rank, one in enumerate(said))
    assert codes == [0] * world, f"{codes} of {module} {arguments}\n{whole}"
    return whole


def ended_ranks(
    module: str, world: int, *arguments: str, servers: int = 1
) -> tuple[list[int], list[str]]:
    """Exit codes of ranks, and what each printed.

    The forks of one server start within milliseconds; interpreters may be ready seconds apart.
    """
    with contextlib.ExitStack() as stack:
        ranks, files = [], []
        for rank, env in enumerate(rank_environments(world)):
            files.append(stack.enter_context(tempfile.TemporaryFile()))
            words = module, list(arguments), env, files[-1], files[-1]
            ranks.append(start(*words, server=rank % servers, warn=False))
        end = time.monotonic() + TIMEOUT_SECONDS
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
            if any(rank.poll() for rank in ranks):
                end = min(end, time.monotonic() + PATIENCE_SECONDS)
            time.sleep(0.05)
        for process in ranks:
            process.kill()
        return [process.wait() for process in ranks], [content(file) for file in files]


def train_ranks(world: int, recipe: Path | str, stage: int | str, *overrides: str) -> str:
    """`lbr-ds train` as ranks that a launcher has started; returns what they printed."""
    return run_ranks("lbr_ds", world, "train", str(recipe), "--stage", str(stage), *overrides)


def content(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


def start_cli(*arguments: str, module: str = "lbr_ds", **options: Any) -> subprocess.Popen[Any]:
    """`lbr-ds ARGUMENTS` in a process of its own, still running; options: of Popen."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def run_cli(*arguments: str, file_limit: int = -1, **env: str) -> subprocess.CompletedProcess[str]:
    """`lbr-ds ARGUMENTS` in a process of its own; the caller looks at returncode and stderr.

    file_limit: no file may grow beyond so many bytes, as on a full disk.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        whole = {**os.environ, "OMP_NUM_THREADS": "1", **env}
        process = start("lbr_ds", list(arguments), whole, out, err, file_limit=file_limit)
        try:
            code = process.wait(TIMEOUT_SECONDS)
        finally:
            process.kill()
        return subprocess.CompletedProcess(arguments, code, content(out), content(err))


def start(
    module: str,
    arguments: list[str],
    env: dict[str, str],
    out: IO[bytes],
    err: IO[bytes],
    **options: Any,
) -> Fork | subprocess.Popen[bytes]:
    """`python -m MODULE ARGUMENTS` as a fork, or anew where its environment differs from ours."""
    forked = fork(module, arguments, env, out, err, **options)
    if forked is not None:
        return forked
    warn, limit = options.get("warn", True), options.get("file_limit", -1)
    return subprocess.Popen(
        [sys.executable, *(() if warn else ("-W", "ignore")), "-m", module, *arguments],
        cwd=ROOT,
        env=env,
        stdout=out,
        stderr=err,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


def free_port() -> int:
    """A TCP port that nobody on this machine listens on.

    Below those that Linux gives to connections: one of these may be taken before a rank listens.
    Above 20000 + N, at which the ranks of SLURM job N meet, for the first 2000 jobs.
    """
    while True:
        with socket.socket() as probe:
            port = 22_000 + secrets.randbelow(10_000)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
