"""LBR-DS: Learn Before Represent on DeepSpeed.

Importing this package imports neither torch nor any other heavy library, so that `plan`, `report`
and `--help` are quick on a login node.
"""

from __future__ import annotations

__version__ = "0.1.0"
