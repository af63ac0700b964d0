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


def versions(names: tuple[str, ...] = ("torch", "deepspeed", "transformers")) -> dict[str, Any]:
    """Ours, and of each package the installed version or None."""
    found: dict[str, Any] = {"lbr-ds": lbr_ds.__version__}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """`key: old -> new` for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{path}.{k}")]
    return [] if old == new else [f"{path[1:]}: {old} -> {new}"]


def cpu_lacks_bf16() -> bool:
    """Whether products of bf16 matrices take this CPU many times what those of fp32 do."""
    import torch

    # oneDNN's answer, as torch's compiler asks it: AVX-512 or AMX, or bf16 on ARM.
    known = torch.backends.mkldnn.is_available()
    return not (known and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def describe() -> dict[str, Any]:
    """JSON-ready. Devices come from NVML (extra `gpu`), or from torch where that is loaded."""
    facts: dict[str, Any] = {
        "lbr-ds": lbr_ds.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "versions": {k: v for k, v in versions(_PACKAGES).items() if k != "lbr-ds"},
    }
    facts |= _devices()
    job = os.environ.get("SLURM_JOB_ID")
    if job:
        facts["slurm"] = {"job": job, "nodes": os.environ.get("SLURM_JOB_NUM_NODES")}
    return facts


def _devices() -> dict[str, Any]:
    """`device` and its memory; with NVML also the driver and how many there are on this node."""
    torch = sys.modules.get("torch")
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return {
            "device": pynvml.nvmlDeviceGetName(handle),
            "device_gib": round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30, 1),
            "devices_per_node": pynvml.nvmlDeviceGetCount(),
            "driver": pynvml.nvmlSystemGetDriverVersion(),
        }
    except ImportError:
        pass
    except pynvml.NVMLError:
        return {}
    if torch is None or not torch.cuda.is_available():
        return {}
    memory = torch.cuda.get_device_properties(0).total_memory
    return {"device": torch.cuda.get_device_name(), "device_gib": round(memory / 2**30, 1)}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
        return names[0]
    except (OSError, IndexError):
        return platform.machine()
