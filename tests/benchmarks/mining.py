"""Suite `mining`: what `lbr-ds mine` with a model costs per passage as a corpus grows.

One passage in ten has a query. The model is a random one of two layers, so that the figures are
those of everything else; `lbr-ds plan` computes what encoding takes with a real one. Each size runs
in a process of its own on one core. Its memory is what it adds to the libraries and the model.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lbr_ds.bench.measure import Row, Target
from lbr_ds.config import BottleneckConfig, ModelConfig, load
from lbr_ds.errors import EnvironmentProblem
from lbr_ds.records import Record
from lbr_ds.shards import Manifest, write_split
from lbr_ds.shards.writer import Lazy
from lbr_ds.system import children
from lbr_ds.system.blocks import ROWS
from tests.benchmarks.prepare import cpu_seconds
from tests.benchmarks.scale_corpus import Recombined
from tests.tiny import tiny_recipe

log = logging.getLogger(__name__)
SIZES = (10_000, 100_000)
QUICK = {"passages": (300, 1200)}
_EVERY = 10  # passages for one query
_QUERY = 12  # words
_TOKENS = 64  # of a text, at most
_PER_SHARD = 4096
_SEED = 1
_MIB = 1 << 20
_MEASURE = "import sys; from tests.benchmarks.mining import report; report(sys.argv[1])"
_STEPS = ("read", "encode", "search", "choose", "write")


class _Records(Lazy):
    """Pairs of a query and a passage that contains it, or the passages between them."""

    def __init__(self, made: Recombined, numbers: Sequence[int], *, asked: bool) -> None:
        self.made, self.numbers, self.asked = made, numbers, asked

    def part(self, places: Sequence[int]) -> _Records:
        """Return those at `places`."""
        numbers = [self.numbers[place] for place in places]
        return _Records(self.made, numbers, asked=self.asked)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: Any) -> Any:
        """Return the record at a place."""
        number = self.numbers[place]
        text, _ = self.made.passage(number)
        if not self.asked:
            return Record(f"p{number}", "made up", text=text)
        query = " ".join([*text.split()[:_QUERY], str(number)])
        return Record(f"q{number}", "made up", query=query, positives=[text])


def suite(data: Path | None = None, passages: tuple[int, ...] = SIZES) -> list[Row]:
    """Rows of each size, and the memory that a further passage takes."""
    from tests.benchmarks.texts import real_passages  # imports torch

    made = Recombined(real_passages(data), _SEED)
    rows: list[Row] = []
    found = []
    for count in passages:
        with tempfile.TemporaryDirectory(prefix="lbr-ds-mining-") as name:
            place = Path(name)
            recipe = _make(place, made, count)
            facts = _measure(recipe)
            facts["disk"] = _bytes_below(place / "data.mining")
            facts["corpus"] = _bytes_below(place / "data")
        log.info("%d passages: %s", count, json.dumps(facts))
        found.append(facts)
        rows += _rows(count, facts)
    if len(passages) > 1:
        more = found[-1]["memory"] - found[0]["memory"]
        growth = Target("mining_memory_growth", 500, 200, "lower", "per passage", "bytes")
        about = f"peak memory from {passages[0]:,} to {passages[-1]:,} passages"
        rows.append(growth.row([more / (passages[-1] - passages[0])], about=about))
    return rows


def _rows(count: int, facts: dict[str, Any]) -> list[Row]:
    steps = {step: facts["steps"][step] for step in _STEPS}
    each = ", ".join(f"{step} {1e6 * cpu / count:.0f}" for step, cpu in steps.items())
    about = f"CPU microseconds per passage: {each}; {facts['model']}, {count // _EVERY:,} queries"
    name = f"mining_{count}"
    rate = Target(f"{name}_rate", 200, 500, "higher", "", "passages per CPU second")
    memory = Target(f"{name}_memory", 1024, 512, "lower", "", "MiB")
    disk = Target(f"{name}_disk", 2, 1.5, "lower", "texts, vectors and rankings over the shards")
    search = Target(f"{name}_search", 10, 20, "higher", "", "GFLOP per CPU second")
    products = 2 * count * (count // _EVERY) * facts["dimension"]
    return [
        rate.row([count / sum(steps.values())], about=about),
        search.row([products / 1e9 / steps["search"]], about="inner products of all pairs"),
        memory.row([facts["memory"] / _MIB], about="added to libraries and model, one rank"),
        disk.row([facts["disk"] / facts["corpus"]], about=disk.about),
    ]


def _make(place: Path, made: Recombined, count: int) -> Path:
    """Write the prepared data, the model and the recipe; return the recipe."""
    from lbr_ds.model.bottleneck import prepare_backbone

    recipe = tiny_recipe(
        place,
        count=1,
        prepared=False,
        model__max_length=_TOKENS,
        data__records_per_shard=_PER_SHARD,
        mining={
            "methods": ["dense"],
            "model": str(place / "run"),
            "passages": ["cl", "gl"],
            "ranks": [1, 100],
        },
    )
    splits = {}
    numbers = {
        "cl": range(0, count, _EVERY),
        "gl": [n for n in range(count) if n % _EVERY],
        # Every hundredth passage is a copy of none.
        "eval": range(100 * count, 100 * count + 20_000, 100),
    }
    for split, own in numbers.items():
        records = _Records(made, own, asked=split != "gl")
        splits[split] = write_split(
            place / "data", split, records, seed=_SEED, records_per_shard=_PER_SHARD
        )
    Manifest(place / "data", splits, [], _SEED, "0" * 16, "made up").save()
    model = ModelConfig(backbone=str(place / "backbone"), max_length=_TOKENS)
    prepare_backbone(model, BottleneckConfig(count=2), place / "run" / "backbone", 0)
    return recipe


def _measure(recipe: Path) -> dict[str, Any]:
    """Mine in another process; return what it reports."""
    command = [sys.executable, "-c", _MEASURE, str(recipe)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=children.environment(env), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise EnvironmentProblem(f"mining by {recipe} failed with code {done.returncode}")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


class _Clock:
    """CPU seconds by step."""

    def __init__(self) -> None:
        self.steps = dict.fromkeys(_STEPS, 0.0)
        self._last = cpu_seconds()

    def charge(self, step: str) -> None:
        """Charge the CPU time since the last call to a step."""
        now = cpu_seconds()
        self.steps[step] += now - self._last
        self._last = now

    def encoding(self, part: str, done: int, total: int | None) -> None:
        """See `Progress`: a call comes after the work."""
        self.charge(part.split()[0])

    def choosing(self, part: str, done: int, total: int | None) -> None:
        """See `Progress`: the search is stored, so what is left is to read and choose."""
        self.charge("choose" if part.split()[0] in ("read", "encode", "search") else "write")


def report(recipe: str) -> None:
    """Mine, and write seconds of CPU and bytes of memory to standard output as JSON."""
    from lbr_ds.distributed import World
    from lbr_ds.encoder import Encoder
    from lbr_ds.mining import bm25  # noqa: F401 - its import is not what is measured
    from lbr_ds.mining.mine import encode, mine

    children.follow_starter()
    run = load(Path(recipe))
    model = Encoder(run.mining.model)
    shape = model.packed_model.model.backbone.config
    model.encode(["a text"] * ROWS, "document")  # buffers of a block are not counted
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before, clock = _memory("VmRSS"), _Clock()
    encode(run, World(), clock.encoding, stay=True)
    clock.charge("search")
    mine(run, clock.choosing)
    clock.charge("write")
    facts = {
        "steps": clock.steps,
        "memory": _memory("VmHWM") - before,
        "dimension": model.dimension,
        "model": f"{shape.num_hidden_layers} layers of {shape.hidden_size}, {_TOKENS} tokens",
    }
    sys.stdout.write(json.dumps(facts) + "\n")


def _memory(which: str) -> int:
    """Return bytes from /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
