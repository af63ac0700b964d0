"""A rank that dies, hangs or fails ends all ranks with one line and one code, told from outside."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lbr_ds.config import RunConfig
from lbr_ds.distributed import World
from lbr_ds.errors import LostRank
from lbr_ds.runs import checkpoints, fault
from lbr_ds.system.io_progress import bytes_moved
from lbr_ds.system.locate import file_sha256
from lbr_ds.training.checkpoint import writing
from lbr_ds.training.heartbeat import Heartbeat
from lbr_ds.training.watch import SAVES, Watch, _Seen
from tests.ranks import start_cli, start_ranks
from tests.training.test_hosts import at_step, ended
from tests.training.test_resume import weights

pytestmark = pytest.mark.slow

SAID = "lbr-ds: error: "


def faulty(recipe: Path, fault: str, rank: int, step: int, *more: str) -> tuple[list[int], str]:
    """Both ranks' exit codes and all that they said; a stopped rank is taken away at the end."""
    ranks = start_ranks(
        "tests.training.faulty",
        2,
        fault,
        str(rank),
        str(step),
        "train",
        str(recipe),
        "--stage",
        "1",
        *more,
    )
    others = [p for i, p in enumerate(ranks) if fault != "stop" or i != rank]
    try:
        said = "".join(process.communicate(timeout=600)[0] for process in others)
    finally:
        for process in ranks:
            process.kill()
    return [process.wait() for process in ranks], said


@pytest.mark.parametrize(
    ("fault", "rank", "codes", "line"),
    [
        ("kill", 0, [-9, 86], r"rank 0 is gone: on \S+, last seen in step \d"),
        ("stop", 1, [86, -9], r"rank 1 is gone: on \S+, last seen in step \d"),
        (
            "hang",
            1,
            [86, 86],
            r"rank 1 is furthest behind: on \S+, last seen in step 2 \(computes",
        ),
        ("raise", 1, [3, 3], r"a planted fault"),
    ],
)
def test_one_line_names_the_rank_and_all_end(
    copied: Path, fault: str, rank: int, codes: list[int], line: str
) -> None:
    shutil.rmtree(copied.parent / "run" / "stage1")
    found, said = faulty(copied, fault, rank, 1)
    assert found == codes, said
    lines = [one for one in said.splitlines() if one.startswith(SAID)]
    assert len(lines) == 1, said
    assert re.search(line, lines[0]), lines
    assert "Traceback" not in said
    if fault == "hang":  # every rank's stacks are in its log
        logs = [copied.parent / "run" / "stage1" / "log" / f"rank-{r}.log" for r in range(2)]
        assert all("most recent call first" in log.read_text() for log in logs)


def test_launcher_names_a_killed_rank(copied: Path) -> None:
    folder = copied.parent / "run" / "stage1"
    shutil.rmtree(folder)
    words = ["train", str(copied), "--stage", "1", "--nproc", "2", "stage1.num_steps=100000"]
    running = start_cli(*words, stderr=subprocess.PIPE, text=True)
    path = folder / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not (path.exists() and path.read_text()):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    said = (folder / "log" / "rank-1.log").read_text()
    os.kill(int(re.search(r"rank 1 of 2, process (\d+)", said)[1]), signal.SIGKILL)  # type: ignore[index]
    assert running.wait(timeout=240) == LostRank.exit_code
    lines = [one for one in running.stderr.read().splitlines() if one.startswith(SAID)]  # type: ignore[union-attr]
    assert len(lines) == 1
    assert re.search(r"rank 1 was killed by SIGKILL \(on \S+, last seen in step \d+", lines[0])


def test_ranks_that_were_suspended_continue(trained: RunConfig, copied: Path) -> None:
    """As SLURM does it for a job of higher rank; for longer than a run may stand still here."""
    folder = copied.parent / "run" / "stage1"
    shutil.rmtree(folder)
    ranks = start_ranks(
        "tests.training.faulty", 2, "slow+suspend", "1", "0", "train", str(copied), "--stage", "1"
    )
    at_step(folder, 2, ranks)
    for number, seconds in ((signal.SIGSTOP, 8), (signal.SIGCONT, 0)):
        for process in ranks:
            process.send_signal(number)
        time.sleep(seconds)
    codes, said = ended(ranks)
    assert codes == [0, 0], said
    assert weights(folder) == weights(trained.run / "stage1")


def test_left_out_updates_and_stragglers_are_in_the_metrics_and_survive_a_resume(
    copied: Path,
) -> None:
    folder = copied.parent / "run" / "stage1"
    shutil.rmtree(folder)
    codes, said = faulty(copied, "nan+slow", 1, 1)
    assert codes == [0, 0], said
    assert re.search(r"step 2: loss .*update skipped. Its samples: r\d+ \(gl/0000\d.tar", said)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["skipped_updates"], last["slowest_rank"]) == (1, 1)
    assert last["straggler"] == last["rank_seconds"][0] / last["rank_seconds"][1]
    (skipped,) = [json.loads(x) for x in (folder / "skipped.jsonl").read_text().splitlines()]
    assert skipped["step"] == 2
    assert [len(names) for names in skipped["samples"].values()] == [4, 4]
    wanted = (checkpoints(folder)[-1] / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(checkpoints(folder)[-1])
    codes, said = faulty(copied, "none", 0, 0)  # from step 3 on
    assert codes == [0, 0], said
    assert (checkpoints(folder)[-1] / "model" / "model.safetensors").read_bytes() == wanted
    again = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert again["skipped_updates"] == 1
    assert again["loss"] == last["loss"]
    starts = [json.loads(x)["step"] for x in (folder / "starts.jsonl").read_text().splitlines()]
    assert starts == [0, 3]


class Stopped(Exception):
    """The watch has ended the process."""


class HandDriven(Watch):
    """A watch of this thread whose clock the test moves; its limit is a minute."""

    def __init__(self) -> None:
        super().__init__(World(), 1)
        self.thread = ThreadPoolExecutor(1)

    def pass_limit(self) -> None:
        """Check in another thread, as a watch does, after more than the limit."""
        self._ran += 61
        self.thread.submit(self._check).result()

    def _end_process(self, code: int, line: str, *, report: bool = True) -> None:
        assert code == LostRank.exit_code
        raise Stopped(line)


def test_a_save_that_takes_longer_than_the_limit_is_not_ended(tmp_path: Path) -> None:
    """Each part of the file takes longer; a writer that is stuck is still found."""
    more, written = threading.Semaphore(0), threading.Semaphore(0)

    def files(part: Path) -> list[Path]:
        with (part / "weights").open("wb", buffering=0) as file:
            for letter in (b"a", b"b", b"c", b"d"):
                more.acquire()
                file.write(letter * 4096)
                written.release()
        return [part / "weights"]

    facts: dict[str, Any] = {"step": 3}
    final = tmp_path / "checkpoints" / "step-000003"
    saving = writing.Writing(writing.Plan(final, 0, 1, files, facts, 2, None, keep_best=False))
    watch = HandDriven()
    watch.mark(3, SAVES)
    watch.pass_limit()
    saving.start()
    for _ in range(3):
        more.release()
        written.acquire()
        watch.pass_limit()
    (tmp_path / "polled").write_bytes(b"what this thread does while it waits is no progress")
    with pytest.raises(Stopped, match=r"no rank made progress for 1 minutes .*\(saves\)"):
        watch.pass_limit()
    more.release()
    saving.join()
    assert (saving.failure, fault(final)) == ("", "")


def test_reading_at_the_start_is_progress(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(b"a" * 4096)
    watch = HandDriven()
    for _ in range(3):
        (tmp_path / "shard").read_bytes()
        watch.pass_limit()
    with pytest.raises(Stopped, match=r"rank 0 is furthest behind: .*\(starts\)"):
        watch.pass_limit()


def test_what_another_rank_writes_is_progress() -> None:
    """It does not count when the rank furthest behind is named."""
    watch = HandDriven()

    def see(moved: int) -> None:
        ranks = [Heartbeat(1, 3, 4, "saves", True, "node", 1)]
        ranks.append(Heartbeat(1, 2, 3, "saves", True, "node", moved))
        watch._seen = {rank: _Seen(last, watch._ran + 61) for rank, last in enumerate(ranks)}
        watch.pass_limit()

    for moved in (5, 9, 12):
        see(moved)
    with pytest.raises(Stopped, match="rank 1 is furthest behind: on node, last seen in step 3"):
        see(12)


def test_a_file_is_flushed_and_hashed_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the progress is visible between any two parts."""
    path, parts, moved = tmp_path / "weights", list[tuple[int, int]](), list[int]()

    def flush_part(handle: int, start: int, length: int) -> None:
        parts.append((start, length))
        moved.append(bytes_moved(threading.current_thread()))
        flush(handle, start, length)

    flush = writing.flush_part
    monkeypatch.setattr(writing, "flush_part", flush_part)
    monkeypatch.setattr(writing, "_PART", 1000)
    for size in (0, 1, 1000, 2500):
        parts.clear()
        moved.clear()
        path.write_bytes(bytes(n % 251 for n in range(size)))
        assert writing.seal(path) == {"bytes": size, "sha256": file_sha256(path)}
        assert parts == [(start, min(1000, size - start)) for start in range(0, size, 1000)]
        assert moved == sorted(set(moved))
