"""Environments with other versions of the libraries, made by pip at their first use and kept.

An *overlay* is a folder of packages that comes before those of this environment on PYTHONPATH: the
same torch with an older transformers, in seconds. A consumer that needs another torch or brings a
server gets a virtual environment of its own. Both are kept under `~/.cache/lbr-ds/stacks`
(LBR_DS_STACKS changes that), under a name that contains a hash of the requirements.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"  # a CPU build on the index of this project's tests
_DONE = "complete"  # an empty file, written last


@dataclass(frozen=True)
class Installed:
    """An interpreter, and the PYTHONPATH with which it sees the other versions."""

    python: Path
    path: str = ""

    def run(self, *arguments: str, timeout: int = 600) -> subprocess.CompletedProcess[str]:
        """Run the interpreter without anything of this project on its path."""
        return subprocess.run(
            [str(self.python), *arguments], env=self.environment(), cwd=self.python.parent,
            capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip

    def environment(self) -> dict[str, str]:
        """The environment variables for a process of this installation; it may use no network."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_", "LBR_"))}
        return {**kept, "PYTHONPATH": self.path, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def overlay(name: str, *requirements: str) -> Installed:
    """Install `requirements` and what they need, except torch and numpy, over this environment."""

    def fill(folder: Path) -> None:
        pip(Path(sys.executable), "--no-deps", "--target", str(folder), *requirements)

    return Installed(Path(sys.executable), str(_made(name, requirements, fill)))


def separate(
    name: str, *requirements: str, finish: Callable[[Path], None] = lambda folder: None
) -> Installed:
    """Make a virtual environment with torch and `requirements`; `finish` corrects it at the end."""

    def fill(folder: Path) -> None:
        venv.create(folder, with_pip=True, symlinks=True)
        python = folder / "bin" / "python"
        # By itself and first, so that the requirements do not choose a build with CUDA libraries.
        if not requirements[0].startswith("vllm"):
            pip(python, TORCH)
        pip(python, *requirements)
        finish(folder)

    return Installed(_made(name, requirements, fill) / "bin" / "python")


def pip(python: Path, *arguments: str) -> None:
    """Run `pip install`."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
               "--root-user-action=ignore", *arguments]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def _made(name: str, requirements: Sequence[str], fill: Callable[[Path], None]) -> Path:
    """The folder of these requirements, filled unless an earlier run has completed it."""
    base = os.environ.get("LBR_DS_STACKS") or Path.home() / ".cache" / "lbr-ds" / "stacks"
    version = "{}.{}".format(*sys.version_info[:2])
    digest = hashlib.sha256(" ".join([version, *requirements]).encode()).hexdigest()[:10]
    folder = Path(base) / f"{name}-{digest}"
    if not (folder / _DONE).exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        fill(folder)
        (folder / _DONE).touch()
    return folder
