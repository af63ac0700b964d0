"""A rank that writes on which addresses its process and its launcher listen.

`python -m tests.processes.listening FOLDER`, started by a launcher. `... launch FOLDER` is one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import psutil

from lbr_ds.distributed import end, join, leave
from lbr_ds.training.launch import launch


def main(folder: Path) -> None:
    world = join(1.0)
    total = world.sum(1.0)  # gloo has opened its sockets
    processes = [psutil.Process()]
    if world.first:
        processes.append(psutil.Process(os.getppid()))
    found = [
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    (folder / f"{world.rank}.json").write_text(json.dumps({"sum": total, "listening": found}))
    leave()
    end(0)


if __name__ == "__main__":
    if sys.argv[1] == "launch":
        sys.exit(launch(sys.argv[2:], 2, module="tests.processes.listening"))
    main(Path(sys.argv[1]))
