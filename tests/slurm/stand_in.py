"""Plays `lbr-ds` for the job scripts: same signals, same exit codes, nothing learnt.

`train`: ranks meet at MASTER_ADDR:MASTER_PORT, then count the steps of stage 1, 0.2 s each, into
RUN/rank-R. USR1, USR2 and TERM end the count after the step in hand with exit code 85; the next
start resumes. STAND_IN_HOLD=1: a start at step 0 does not take its last step, but waits for a
signal. STAND_IN_CODE=N: rank 1 fails with N after one step. STAND_IN_SKEW=S: a stopping rank R
takes R * S seconds more. `bench`, as a rank of a configuration: rank 0 writes made-up
figures, and with STAND_IN_CODE rank 1 fails. `doctor` finds its node fit, unless STAND_IN_SICK is
the node's name. Any other verb only says that it ran.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

stop = False


def meet(rank: int, world: int) -> None:
    """Return once all ranks have reached rank 0."""
    place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if rank == 0:
        with socket.create_server(place, backlog=world) as server:
            for _ in range(world - 1):
                server.accept()[0].close()
        return
    end = time.monotonic() + 120
    while True:
        try:
            socket.create_connection(place, timeout=5).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def handle(number: int, frame: object) -> None:
    """Only take note; the loop acts at its next step."""
    global stop
    stop = True


def bench() -> int:
    """Figures as a rank of `bench cluster` writes them; a step of as many ranks takes a second."""
    rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    network = "--network" in sys.argv
    print(f"rank {rank} of {world}, {os.environ['SLURM_JOB_NUM_NODES']} node(s)", flush=True)
    if rank == 1 and not network and "STAND_IN_CODE" in os.environ:
        print("lbr-ds: error: made to fail", flush=True)
        return int(os.environ["STAND_IN_CODE"])
    both = ("all_gather", "reduce_scatter")
    found = {"device": "made-up", "hosts": [f"n{i + 1}" for i in range(world)]}
    rates = [{"collective": c, "bytes": 1 << 20, "seconds": 1, "gb_per_second": 2} for c in both]
    figures = {
        "data": "real",
        "tokens_per_second_per_rank": 100.0 / world,
        "step_seconds": 1,
        "flops_per_second_per_rank": 1e9,
        "memory_gib": 1,
        "data_wait_share": 0,
        "collective_share": 0.5,
        "exposed_share": 0.25,
        "straggler": 1,
    }
    if rank == 0:
        row = Path(sys.argv[sys.argv.index("--row") + 1])
        row.write_text(json.dumps(found | ({"collectives": rates} if network else figures)))
    return 0


def main() -> int:
    """The exit code of the verb."""
    if sys.argv[1] == "bench":
        return bench()
    node = os.environ.get("SLURMD_NODENAME", "")
    if sys.argv[1] == "doctor" and node == os.environ.get("STAND_IN_SICK"):
        print(f"lbr-ds: error: {node}: GPU 3: made to fail", file=sys.stderr, flush=True)
        return 6
    if sys.argv[1] != "train":
        print(f"stand-in: {' '.join(sys.argv[1:])}", flush=True)
        return 0
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, handle)
    rank, world = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    given = dict(word.split("=", 1) for word in sys.argv if "=" in word)
    meet(rank, world)
    place = Path(given["run"]) / f"rank-{rank}"
    place.parent.mkdir(parents=True, exist_ok=True)
    step = int(place.read_text()) if place.exists() else 0
    steps, held = int(given["stage1.num_steps"]), step == 0 and "STAND_IN_HOLD" in os.environ
    print(f"rank {rank} of world size {world} starts at step {step}", flush=True)
    while step < steps:
        time.sleep(0.2)
        step = min(step + 1, steps - held)
        place.write_text(str(step))
        if stop:
            time.sleep(rank * float(os.environ.get("STAND_IN_SKEW", "0")))
            return 85
        if rank == 1 and "STAND_IN_CODE" in os.environ:
            return int(os.environ["STAND_IN_CODE"])
    print(f"rank {rank} is done at step {step}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
