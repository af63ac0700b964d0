"""Environments with other versions of the libraries, made by pip at their first use and kept.

Each is a virtual environment under `~/.cache/lbr-ds/stacks` (LBR_DS_STACKS changes that), in a
folder whose name contains a hash of its requirements.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"  # a CPU build on the index of this project's tests
_DONE = "complete"  # an empty file, written last


@dataclass(frozen=True)
class Installed:
    """The interpreter of an environment."""

    python: Path

    def run(self, *arguments: str, timeout: int = 600) -> subprocess.CompletedProcess[str]:
        """Run the interpreter without anything of this project on its path."""
        return subprocess.run(
            [str(self.python), *arguments],
            env=self.environment(),
            cwd=self.python.parent,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def environment(self) -> dict[str, str]:
        """The environment variables for a process of this installation; it may use no network."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_", "LBR_"))}
        return {**kept, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def installed(
    name: str, *requirements: str, torch: str = TORCH, finish: Callable[[Path], None] | None = None
) -> Installed:
    """Return an environment with torch and `requirements`; `finish` corrects it when it is new."""
    base = os.environ.get("LBR_DS_STACKS") or Path.home() / ".cache" / "lbr-ds" / "stacks"
    version = "{}.{}".format(*sys.version_info[:2])
    digest = hashlib.sha256(" ".join([version, torch, *requirements]).encode()).hexdigest()[:10]
    folder = Path(base) / f"{name}-{digest}"
    python = folder / "bin" / "python"
    if not (folder / _DONE).exists():
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True, symlinks=True)
        # By itself and first, so that the requirements do not choose a build with CUDA libraries.
        for wanted in ([torch] if torch else [], requirements):
            if wanted:
                pip(python, *wanted)
        if finish is not None:
            finish(folder)
        (folder / _DONE).touch()
    return Installed(python)


def pip(python: Path, *arguments: str) -> None:
    """Run `pip install`."""
    command = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--root-user-action=ignore",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
