"""An update that is left out leaves nothing behind; what is left out is counted and named."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections import deque
from pathlib import Path

import pytest
import torch

from lbr_ds.config import GuardConfig, RunConfig, load
from lbr_ds.distributed import World
from lbr_ds.errors import TrainingError
from lbr_ds.model.bottleneck import prepare_backbone
from lbr_ds.shards import Manifest
from lbr_ds.training.guard import SKIPPED, WINDOW, Guard
from lbr_ds.training.meter import forget_after
from lbr_ds.training.work import Work
from tests.ranks import run_ranks
from tests.tiny import tiny_recipe
from tests.training.guarded import LAYOUTS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    run = load(tiny_recipe(tmp_path_factory.mktemp("guard")))
    prepare_backbone(run.model, run.bottleneck, run.run / "backbone", run.seed)
    (run.run / "recipe.yaml").write_text(run.dump())
    return run


def test_left_out_updates_leave_nothing_behind(run: RunConfig) -> None:
    """Bit for bit, ZeRO-1 to 3, bf16 and fp32: optimizer and gradients are as if never touched."""
    run_ranks("tests.training.guarded", 2, str(run.run / "recipe.yaml"), str(run.run))
    for layout in LAYOUTS:
        plain, mixed = torch.load(run.run / f"{layout}.pt")
        for kind, norm, applied in plain["results"] + mixed["results"]:
            assert applied is (kind == "good"), (layout, kind)
            assert math.isfinite(norm) is (kind in ("good", "refused")), (layout, kind)
        for name, wanted in plain["weights"].items():
            assert torch.equal(mixed["weights"][name], wanted), (layout, name)


def guard(
    run: RunConfig, folder: Path, counters: dict[str, object] | None = None, **settings: object
) -> Guard:
    made = Guard(GuardConfig(**settings), folder, World())  # type: ignore[arg-type]
    made.load_state_dict(counters or {})
    return made


def take(own: Guard, run: RunConfig, step: int, loss: float, norm: float) -> bool:
    """What the loop does with a step; returns whether its update is applied."""
    work = Work(step, 1, 0, [], [], [("r1", 0, 3)])
    applied = own.accepts(loss, norm)
    own.record(work, applied, 2, run.data.folder, ["gl"])
    return applied


def test_non_finite_steps_are_counted_named_and_end_the_run(run: RunConfig, tmp_path: Path) -> None:
    own = guard(run, tmp_path, max_skipped=2, max_skipped_total=4)
    bad = [(math.nan, 1.0), (1.0, math.inf)]
    seen = [take(own, run, i, *pair) for i, pair in enumerate([*bad, (1.0, 1.0), *bad])]
    assert seen == [False, False, True, False, False]
    assert (own.total, own.in_a_row, own.samples) == (4, 2, 10)
    lines = [json.loads(line) for line in (tmp_path / SKIPPED).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4, 5]
    where = Manifest.load(run.data.folder).shards("gl")[0].file
    assert lines[0]["samples"] == {"0": [f"r1 ({where} record 3)"]}
    assert lines[0]["reason"] == "loss nan, gradient norm 1"
    with pytest.raises(TrainingError, match=r"step 6: .*3 updates skipped.*max_skipped=2"):
        take(own, run, 5, math.nan, 1.0)
    again = guard(run, tmp_path, own.state_dict(), max_skipped=9, max_skipped_total=4)
    with pytest.raises(TrainingError, match=r"6 updates skipped.*max_skipped_total=4"):
        take(again, run, 6, math.nan, 1.0)


def test_a_resume_keeps_the_lines_of_any_record_id(run: RunConfig, tmp_path: Path) -> None:
    """Characters at which str.splitlines() splits may be in an id; JSON escapes only some."""
    own, file = guard(run, tmp_path, max_skipped=9), tmp_path / SKIPPED
    for step, name in enumerate(("a\u2028b", "c\u0085d", "e\u2029f\n", "g")):
        own.accepts(math.nan, 1.0)
        own.record(Work(step, 1, 0, [], [], [(name, 0, 3)]), False, 0, run.data.folder, ["gl"])
    written = file.read_text(encoding="utf-8")
    assert forget_after(file, 3) == 4
    assert file.read_text(encoding="utf-8") == "".join(
        line + "\n" for line in written.split("\n")[:3]
    )


def test_spikes_against_the_rule_written_out(run: RunConfig, tmp_path: Path) -> None:
    """Also after a resume in the middle, whose counters went through JSON."""
    rng = random.Random(0)
    values = [(rng.gauss(3, 0.1), rng.gauss(1, 0.1)) for _ in range(400)]
    for step, pair in ((30, (9.0, 1.0)), (150, (9.0, 1.0)), (260, (3.0, 4.0)), (261, (3.0, 0.1))):
        values[step] = pair
    settings = {"spike_sigmas": 6.0, "max_skipped_total": 400}
    own, seen = guard(run, tmp_path, **settings), []
    for step, pair in enumerate(values):
        if step == 200:
            own = guard(run, tmp_path, json.loads(json.dumps(own.state_dict())), **settings)
        seen.append(take(own, run, step, *pair))
    wanted, windows = [], (deque[float](maxlen=WINDOW), deque[float](maxlen=WINDOW))
    for pair in values:
        spikes = [
            len(window) >= 64 and value > statistics.fmean(window) + 6 * statistics.pstdev(window)
            for value, window in zip(pair, windows, strict=True)
        ]
        wanted.append(not any(spikes))
        for value, window in zip(pair, windows, strict=True):
            window.append(value)
    assert seen == wanted
    assert [step for step, applied in enumerate(seen) if not applied] == [150, 260]
