"""Benchmark a cluster with a recipe, by ranks, micro-batch and ds_config: `bench cluster`.

    result = run_sweep(Sweep("my.yaml", stage=1, ranks=(8, 16, 32), folder=Path("bench-32")))

sweep.py runs once, in the job's batch script, and starts each configuration in its own processes
(processes.py). rank.py is what a rank measures, traffic.py what collectives cost, derive.py what
follows from the rows; table.py and plot.py print them.
"""

from __future__ import annotations

from lbr_ds.cluster.benchmark.sweep import Sweep, default_ranks, run_sweep

__all__ = ["Sweep", "default_ranks", "run_sweep"]
