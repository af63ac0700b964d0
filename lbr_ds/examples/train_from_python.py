"""Prepare data, train both stages, evaluate and export, from Python.

    python train_from_python.py [RECIPE] [key=value ...]

Without arguments this is `lbr-ds demo` in Python: about nine minutes on two CPU cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lbr_ds


def main(recipe: str = "demo", *overrides: str) -> None:
    """Go through the whole pipeline and print what it gives."""
    run = lbr_ds.load_recipe(recipe, overrides)
    curation = lbr_ds.prepare(run)
    print({name: split["records"] for name, split in curation["splits"].items()})

    for stage in (1, 2):
        # Ranks are processes of their own. Under srun or torchrun leave nproc out: each of the
        # processes that they start calls this function and is one rank.
        checkpoint = lbr_ds.train(run, stage, nproc=2)
        print(f"stage {stage}: {checkpoint}")

    scores = lbr_ds.evaluate(run.run, data=run.data.folder, max_queries=200)
    for task, values in scores["tasks"].items():
        print(f"{task}: R@10 {values['recall_at_10']:.3f}, N@10 {values['ndcg_at_10']:.3f}")

    out = Path(run.run) / "export"
    parity = lbr_ds.export(run.run, out)
    print(f"{out}: largest difference to the trainer {parity['largest_difference']:.1e}")


if __name__ == "__main__":  # rank processes and data loaders import this file again
    main(*sys.argv[1:])
