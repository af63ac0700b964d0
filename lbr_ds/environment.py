"""What a run ran on: versions, machine, device. Written to `RUN/environment.json`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

import lbr_ds

_PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "webdataset", "mteb",
             "sentence-transformers", "safetensors", "pydantic", "numpy")  # fmt: skip


def describe() -> dict[str, Any]:
    """JSON-ready. Asks torch for the device only where torch is loaded already."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    facts: dict[str, Any] = {
        "lbr-ds": lbr_ds.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "versions": versions,
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
        facts["device_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    job = os.environ.get("SLURM_JOB_ID")
    if job:
        facts["slurm"] = {"job": job, "nodes": os.environ.get("SLURM_JOB_NUM_NODES")}
    return facts


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
        return names[0]
    except (OSError, IndexError):
        return platform.machine()
