"""Train where the first rehearsal runs out of memory, and nothing after it.

`python -m tests.training.short_of_memory RECIPE BYTES KEY=VALUE ...`: once the session is open, the
process may map BYTES more, until it has told that it ran out of them.
"""

from __future__ import annotations

import logging
import resource
import sys
from pathlib import Path

from lbr_ds.config import load
from lbr_ds.distributed import end, leave
from lbr_ds.training.loop import train


class Limit(logging.Handler):
    """Sets the limit at the line that ends the first start, and lifts it at that of the second."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size: int | None = size

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if line.startswith("stage 1: world size") and self.size is not None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit, self.size = pages * resource.getpagesize() + self.size, None
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        elif line.startswith("auto: ") and self.size is None:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)


if __name__ == "__main__":
    logging.getLogger("lbr_ds").setLevel(logging.INFO)
    logging.getLogger().addHandler(Limit(int(sys.argv[2])))
    print("complete:", train(load(sys.argv[1], sys.argv[3:]), 1))
    leave()
    end(0)
