"""Describe versions, machine and device of a run, for `RUN/environment.json`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import urllib.parse
from pathlib import Path
from typing import Any

import lbr_ds
from lbr_ds.system.urls import public_url

_PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "tokenizers",
    "datasets",
    "webdataset",
    "mteb",
    "sentence-transformers",
    "safetensors",
    "pydantic",
    "numpy",
)


def versions(names: tuple[str, ...] = ("torch", "deepspeed", "transformers")) -> dict[str, Any]:
    """Return the installed version of lbr-ds and of each package, or None."""
    found: dict[str, Any] = {"lbr-ds": lbr_ds.__version__}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def installation() -> dict[str, Any]:
    """Describe where this copy of lbr-ds came from, as recorded by the installer (PEP 610).

    Returns:
        `version`, and as far as known: `source` (a URL without password, or the name of an
        archive), `commit`, `changed` (the clone has local changes), `install` (a command that
        installs the same code; never a bare name, which an index may give to other code).
    """
    facts: dict[str, Any] = {"version": lbr_ds.__version__}
    try:
        recorded = importlib.metadata.distribution("lbr-ds").read_text("direct_url.json")
        origin = json.loads(recorded or "{}")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        origin = {}
    url = str(origin.get("url", ""))
    if commit := origin.get("vcs_info", {}).get("commit_id"):
        place = url if url.startswith("ssh://") else public_url(url)  # of ssh the user is no secret
        source = f"{origin['vcs_info']['vcs']}+{place}"
        return facts | {
            "source": source,
            "commit": commit,
            "install": f"pip install 'lbr-ds @ {source}@{commit}'",
        }
    if "archive_info" in origin:
        local = url.startswith("file:")
        source = urllib.parse.unquote(url.rpartition("/")[2]) if local else public_url(url)
        digest = origin["archive_info"].get("hashes", {}).get("sha256")
        pinned = f"#sha256={digest}" if digest and not local else ""
        return facts | {"source": source, "install": f"pip install '{source}{pinned}'"}
    return facts | _git_checkout(Path(lbr_ds.__file__).parent.parent)


def _git_checkout(folder: Path) -> dict[str, Any]:
    """Return the commit of the git clone that lbr-ds runs from; {} where there is none."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    if not (folder / ".git").exists():
        return {}
    try:
        commit = git("rev-parse", "HEAD")
        changed = bool(git("status", "--porcelain", "--untracked-files=no", "--", "lbr_ds"))
    except (OSError, subprocess.SubprocessError):
        return {}
    note = "  # in a clone of lbr-ds" + (", with local changes" if changed else "")
    return {
        "commit": commit,
        "changed": changed,
        "install": f"git checkout {commit[:12]} && pip install .{note}",
    }


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return `key: old -> new` for every value that differs between two JSON values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{path}.{k}")]
    return [] if old == new else [f"{path[1:]}: {old} -> {new}"]


def cpu_lacks_bf16() -> bool:
    """Return whether this CPU multiplies bf16 matrices many times slower than fp32 ones."""
    import torch

    # oneDNN's answer, as torch's compiler asks it: AVX-512 or AMX, or bf16 on ARM.
    known = torch.backends.mkldnn.is_available()
    return not (known and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def free_host_memory() -> int:
    """Return the free bytes of host memory, within the limit of the SLURM job (cgroup v2)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        place = Path("/sys/fs/cgroup") / line.rpartition(":")[2].lstrip("/")
        for level in (place, *place.parents):
            # This step may have less memory than the training step: use the job's own level.
            if "step_" not in str(level) and (limit := level / "memory.max").is_file():
                text = limit.read_text().strip()
                found += [int(text)] if text.isdigit() else []
    return min(found)


def describe() -> dict[str, Any]:
    """Return everything known, ready for JSON; devices from NVML (extra `gpu`) or loaded torch."""
    facts: dict[str, Any] = {
        "lbr-ds": installation(),
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
    """Return `device` and its memory; with NVML also the driver and the number of devices."""
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
