"""One log file per rank, in RUN/stageN/log."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from lbr_ds.distributed import World
from lbr_ds.system.masking import mask_record

log = logging.getLogger(__name__)


class _LogFile(logging.FileHandler):
    """A log file that survives a full disk: one line reports it, and training continues."""

    reported = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Report the first error of `emit`, and ignore the others."""
        if not self.reported:
            self.reported = True
            print(f"{self.baseFilename}: log lines are lost ({sys.exc_info()[1]})", file=sys.stderr)


def open_log(folder: Path, world: World) -> None:
    """Log to a file of this rank; rank 0 also keeps the terminal, set up by the command line.

    The file of an earlier call is closed: a stage that starts again logs no line twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger("lbr_ds")
    handler = _LogFile(folder / f"rank-{world.rank}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(mask_record)
    for other in list(root.handlers):
        if isinstance(other, _LogFile) or not world.first:
            root.removeHandler(other)
            other.close()
    root.addHandler(handler)
    log.info("rank %d of %d, process %d on %s", world.rank, world.size, os.getpid(), os.uname()[1])
