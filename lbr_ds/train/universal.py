"""A checkpoint's state -> DeepSpeed's universal format, which any number of ranks can load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def to_universal(folder: Path, out: Path) -> str:
    """Convert one tag of a DeepSpeed checkpoint, in a process of its own; returns what failed.

    The converter forks workers, which a rank with its communication threads must not.
    """
    workers = str(min(8, os.cpu_count() or 1))
    command = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
        "--input_folder", str(folder), "--output_folder", str(out),
        "--num_extract_workers", workers, "--num_merge_workers", workers,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""
