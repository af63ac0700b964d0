"""Both stages by the Python API in one process that a launcher started: `... api_stages RECIPE`."""

from __future__ import annotations

import sys

import lbr_ds
from lbr_ds.distributed import end, leave

if __name__ == "__main__":
    recipe = lbr_ds.load_recipe(sys.argv[1])
    for number in (1, 2):
        lbr_ds.train(recipe, number)
    leave()
    end(0)
