"""GPUs and clusters of them. gpus.yaml is the table of GPUs; a file of your own adds to it."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from lbr_ds.config.section import Section
from lbr_ds.config.validation import describe_error
from lbr_ds.errors import ConfigError
from lbr_ds.system.yaml_json import read_yaml


class Gpu(Section):
    """One GPU or the cores of one CPU rank, and its share of the node; see gpus.yaml.

    Bandwidths are in GB/s per direction.
    """

    name: str
    memory_gib: float = Field(gt=0, le=1e9)
    tflops: float = Field(gt=0, le=1e9)
    hbm: float = Field(gt=0, le=1e9)
    link: float = Field(gt=0, le=1e9)
    network: float = Field(default=50, gt=0, le=1e9)
    host_link: float = Field(default=25, gt=0, le=1e9)
    host_memory_gib: float = Field(default=128, gt=0, le=1e9)
    matmul: float = Field(default=0.6, gt=0, le=1)
    cpu: bool = False


@dataclass(frozen=True)
class Cluster:
    """`nodes` nodes of `per_node` GPUs each, with one rank per GPU."""

    nodes: int
    per_node: int
    gpu: Gpu

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.nodes * self.per_node


def gpu_of_device(device: str) -> Gpu | None:
    """Return the table's GPU for a name that a driver reports, such as "NVIDIA H100 80GB HBM3".

    None for a device that the table lacks. A PCIe or NVL build is never taken for an SXM one, which
    is faster.
    """
    words = set(re.findall(r"[a-z0-9]+", device.lower()))
    builds = words & {"pcie", "nvl"}
    for name in _table():
        key = set(name.split("-"))
        if key <= words and builds <= key and not (gpu := find_gpu(name)).cpu:
            return gpu
    return None


def find_gpu(name: str, network: float | None = None) -> Gpu:
    """Return a GPU by its name in the table, or from a YAML file.

    Args:
        name: a key of gpus.yaml, or the path of a file with one such mapping.
        network: GB/s per GPU to other nodes, instead of the table's value.

    Raises:
        ConfigError: no such GPU, or a file with a wrong key or value.
    """
    table = _table()
    if Path(name).is_file():
        raw = read_yaml(Path(name), "a GPU")
    elif name.lower() in table:
        raw = table[name.lower()]
    else:
        near = difflib.get_close_matches(name.lower(), table, 1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(table)}"
        raise ConfigError(f"--gpu {name}: no such GPU and no such file; {hint}")
    if network is not None:
        raw = {**raw, "network": network}
    try:
        return Gpu.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"--gpu {name}: {describe_error(error, Gpu)}") from None


def _table() -> dict[str, Any]:
    return read_yaml(Path(__file__).with_name("gpus.yaml"), "the table")
