"""Print how many ranks `launched_ranks` finds in each environment of a JSON list in argv[1]."""

from __future__ import annotations

import json
import os
import sys

from lbr_ds.distributed import launched_ranks

found = []
for environment in json.loads(sys.argv[1]):
    os.environ.update({k: v.replace("PID", str(os.getpid())) for k, v in environment.items()})
    found.append(launched_ranks())
    for name in environment:
        del os.environ[name]
print(json.dumps(found))
