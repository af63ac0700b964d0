"""Plan a recipe on a cluster before any GPU is allocated.

    plan = make_plan(run, Cluster(nodes=1, per_node=8, gpu=find_gpu("h100")))
    plan["best"], plan["layouts"][0]["stages"][0]["gpu_gib"]

The plan needs the backbone's config.json and nothing else: no weights, no GPU, no torch and no
network. shape.py counts parameters, work.py what a step computes, memory.py bytes, speed.py traffic
and time; planner.py puts them together and table.py prints them.
"""

from __future__ import annotations

from lbr_ds.plan.gpus import Cluster, Gpu, find_gpu
from lbr_ds.plan.planner import make_plan, predict

__all__ = ["Cluster", "Gpu", "find_gpu", "make_plan", "predict"]
