"""Several nodes make the bytes of one, whatever is killed; here they are processes of this host."""

from __future__ import annotations

import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lbr_ds.config import DataConfig, load
from lbr_ds.corpora import engine, nodes, sources
from lbr_ds.corpora.nodes import Nodes, Spread
from lbr_ds.corpora.prepare import prepare
from lbr_ds.corpora.store import Store
from lbr_ds.errors import DataError, EnvironmentProblem
from lbr_ds.system.process_pool import kept_processes, map_in_order
from tests.benchmarks.scale_corpus import Recombined, write_corpus
from tests.corpora.test_groups import templated
from tests.corpora.test_near_duplicates import leaky, prose
from tests.corpora.test_prepare import everything
from tests.corpora.toy import write_raw
from tests.test_trust import Planted

SOURCES = 4


def files(tmp_path: Path, number: int = 120) -> dict[str, Any]:
    """Several sources with near duplicates across them, repeated records, bad rows, negatives."""
    raws = [*leaky(number)[0], *({**raw, "id": f"t{raw['id']}"} for raw in templated(40))]
    draw = random.Random(0)
    for raw in raws:
        raw["negatives"] = draw.choice(raws)["positives"]
    raws += [{**raws[0], "id": "again"}, raws[1]]
    paths = [
        write_raw(tmp_path / f"raw{n}.jsonl", [*raws[n::SOURCES], "{"]) for n in range(SOURCES)
    ]
    return {
        "sources": [{"path": str(path), "license": "CC0"} for path in paths],
        "records_per_shard": 32,
        "on_error": "skip",
    }


def alone(tmp_path: Path, data: dict[str, Any], seed: int = 0) -> dict[str, bytes]:
    """What one node makes of it."""
    config = DataConfig.model_validate({**data, "folder": tmp_path / "alone"})
    prepare(config, seed)
    return everything(config.folder)


def start(tmp_path: Path, data: dict[str, Any], node: int, tasks: int = 3, **more: Any) -> Any:
    """Start one of two nodes."""
    recipe = tmp_path / "recipe.yaml"
    if not recipe.exists():
        plain = load("demo").model_dump(mode="json", exclude_defaults=True)
        whole = {**plain, "data": {**data, "folder": str(tmp_path / "data")}}
        recipe.write_text(yaml.safe_dump(whole))
    share = ["--engine", "datatrove", "--tasks", str(tasks), "--nodes", "2", "--node", str(node)]
    command = [sys.executable, "-m", "lbr_ds", "prepare", str(recipe), "seed=0", *share]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more
    )


def end(started: list[Any]) -> list[tuple[int, str]]:
    """Exit codes and outputs."""
    said = [process.communicate(timeout=900)[0] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def test_two_nodes_make_the_bytes_of_one(tmp_path: Path) -> None:
    data = files(tmp_path)
    ended = end([start(tmp_path, data, node) for node in (0, 1)])
    assert [code for code, _ in ended] == [0, 0], ended
    assert everything(tmp_path / "data") == alone(tmp_path, data)
    assert ".data.lbr-nodes" not in os.listdir(tmp_path)
    # Node 0 has nothing to do, and may be ready before node 1 has started.
    (code, said), other = end([start(tmp_path, data, node) for node in (0, 1)])
    assert (code, other[0]) == (0, 0), (said, other)
    assert "reused" in said


def small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, 1 << 12))


@pytest.mark.slow
def test_full_disk_on_one_node_loses_nothing(tmp_path: Path) -> None:
    """Named by both nodes; the old folder stays; the same command resumes when there is space."""
    data = files(tmp_path)
    before = alone(tmp_path, data, seed=1)
    os.rename(tmp_path / "alone", tmp_path / "data")
    broken = [start(tmp_path, data, 0), start(tmp_path, data, 1, preexec_fn=small_files)]
    (first, line), (second, own) = end(broken)
    assert (first, second) == (6, 6)
    assert "the file grows beyond the limit of this system" in own
    assert "node 1 of 2" in line
    assert "the file grows beyond the limit of this system" in line
    assert everything(tmp_path / "data") == before
    (work,) = tmp_path.glob(".data.lbr-*.part")
    done = {path: path.stat().st_mtime_ns for path in work.glob("phases/*/completions/*")}
    assert done  # those of node 0
    assert [code for code, _ in end([start(tmp_path, data, node) for node in (0, 1)])] == [0, 0]
    assert everything(tmp_path / "data") == alone(tmp_path, data)


def interrupt(config: DataConfig, monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    """Prepare without an engine, until Ctrl-C when a part is stored."""
    real, calls = Store.add_part, 0

    def stopped(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == part:
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "add_part", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, 0)


def in_turns(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch, alone: int, together: int, again: int
) -> None:
    """Prepare on one node, on several, on one and on several; all but the last are interrupted.

    alone, together, again: when which part is stored.
    """
    interrupt(config, monkeypatch, alone)
    with engine.leading(config.local_folder, Spread(3)):
        interrupt(config, monkeypatch, together)
    interrupt(config, monkeypatch, again)
    with engine.leading(config.local_folder, Spread(3)):
        prepare(config, 0)


def test_one_node_and_several_read_again_what_the_other_has_read_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = files(tmp_path, 60)
    expected = alone(tmp_path, data)
    config = DataConfig.model_validate({**data, "folder": tmp_path / "data"})
    monkeypatch.setattr("lbr_ds.corpora.reading._ROWS", 16)
    in_turns(config, monkeypatch, alone=3, together=2, again=5)
    assert everything(tmp_path / "data") == expected


def test_many_files_are_pieces_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = files(tmp_path, 60)
    folder = tmp_path / "raw"
    folder.mkdir()
    for source in data["sources"]:
        Path(source["path"]).rename(folder / Path(source["path"]).name)
    (folder / "raw9.jsonl").touch()  # empty files are no pieces
    data["sources"] = [{"path": str(folder), "license": "CC0"}]
    monkeypatch.setattr("lbr_ds.corpora.formats.interface.PIECE_BYTES", 1 << 12)
    expected = alone(tmp_path, data)
    config = DataConfig.model_validate({**data, "folder": tmp_path / "data"})
    corpus = sources.find(config.sources[0])
    assert list(corpus.shared_pieces()) == list(corpus.pieces())
    monkeypatch.setattr(sources, "MANY_FILES", SOURCES)
    assert len(list(corpus.shared_pieces())) == SOURCES < len(list(corpus.pieces()))
    in_turns(config, monkeypatch, alone=12, together=3, again=14)
    assert everything(tmp_path / "data") == expected


def test_pieces_read_by_many_processes_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an engine; Ctrl-C after some pieces, then the bytes of a source read as a whole."""
    data = files(tmp_path)
    expected = alone(tmp_path, data)
    monkeypatch.setattr("lbr_ds.corpora.formats.interface.PIECE_BYTES", 1 << 12)
    config = DataConfig.model_validate({**data, "folder": tmp_path / "data"})
    assert len(list(sources.find(config.sources[1]).pieces())) > 4
    interrupt(config, monkeypatch, 14)
    rows: list[int] = []
    prepare(config, 0, lambda step, done, total: rows.append(done) if "raw" in step else None)
    assert everything(tmp_path / "data") == expected
    assert len(rows) < sum(len(list(sources.find(s).pieces())) for s in config.sources) - 10


def do(job: tuple[Path, int]) -> int:
    """Note the job; the one with a file `kill` or `fail` fails, once."""
    folder, number = job
    with (folder / "done").open("a") as file:
        file.write(f"{number}\n")
    for name in ("kill", "fail"):
        mark = folder / f"{name}-{number}"
        if mark.exists():
            mark.unlink()
            if name == "fail":
                raise DataError("made to fail")
            os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def run(folder: Path, tasks: int, jobs: int = 12) -> list[int]:
    spread = Spread(tasks)
    with engine.leading(folder, spread), kept_processes(folder / "phases"):
        every: Iterator[tuple[Path, int]] = ((folder, number) for number in range(jobs))
        return list(map_in_order(do, every, phase="squares"))


def noted(folder: Path) -> list[int]:
    return sorted(map(int, (folder / "done").read_text().split()))


def test_a_killed_task_is_done_again_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "cores", lambda: 2)
    (tmp_path / "kill-5").touch()
    assert run(tmp_path, tasks=4) == [number * number for number in range(12)]
    # Task 1 has the jobs 1, 5 and 9.
    assert noted(tmp_path) == sorted([*range(12), 1, 5])


def test_only_tasks_without_a_marker_are_done_again(tmp_path: Path) -> None:
    (tmp_path / "fail-6").touch()
    with pytest.raises(DataError, match="made to fail"):
        run(tmp_path, tasks=4)
    before = noted(tmp_path)
    complete = {int(p.name) for p in (tmp_path / "phases").glob("*/completions/*")}
    assert 2 not in complete
    assert 0 in complete
    assert run(tmp_path, tasks=4) == [number * number for number in range(12)]
    again = [number for number in range(12) if number % 4 not in complete]
    assert noted(tmp_path) == sorted([*before, *again])
    assert run(tmp_path, tasks=4) == [number * number for number in range(12)]
    assert noted(tmp_path) == sorted([*before, *again])


@pytest.mark.parametrize("name", ["jobs", "results"])
def test_what_others_may_have_written_is_not_unpickled(tmp_path: Path, name: str) -> None:
    """Pickles planted in a folder that is open to others do not run."""
    (tmp_path / "fail-6").touch()
    with pytest.raises(DataError, match="made to fail"):
        run(tmp_path, tasks=4)
    (phase,) = (tmp_path / "phases").iterdir()
    assert phase.stat().st_mode & 0o777 == 0o700
    sign = tmp_path / "was-run"
    for path in (phase / name).iterdir():
        path.write_bytes(pickle.dumps(Planted(sign)))
    phase.chmod(0o770)
    with pytest.raises(EnvironmentProblem, match="another user may write"):
        run(tmp_path, tasks=4)
    assert not sign.exists()


def test_a_node_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "LOST", 1.0)
    monkeypatch.setattr(nodes, "LEAVE", 1.0)
    with (
        pytest.raises(EnvironmentProblem, match="node 1 of 2 has not started"),
        engine.leading(tmp_path / "data", Spread(4, 0, 2)),
        kept_processes(tmp_path / "phases"),
    ):
        list(map_in_order(do, ((tmp_path, n) for n in range(4)), phase="squares"))
    with pytest.raises(EnvironmentProblem, match=r"node 1 of 2: node 0 has not started .* share"):
        Nodes(tmp_path / "data", 1, 2).assist(lambda folder, tasks: None)


@pytest.mark.suites
def test_fifty_thousand_records_on_two_nodes_killed_and_resumed(tmp_path: Path) -> None:
    """Both nodes are killed once in each of four phases; then the bytes are those of one node.

    So they are with another number of tasks.
    """
    draw = random.Random(3)
    made = Recombined([prose(draw, 80) for _ in range(3000)], seed=1)
    write_corpus(tmp_path / "raw.jsonl", made, 50_000)
    data: dict[str, Any] = {"sources": [{"path": str(tmp_path / "raw.jsonl"), "license": "x"}]}
    for phase in ("read", "near-duplicates", "write-gl", "prove-gl"):
        started = [start(tmp_path, data, node, 7, start_new_session=True) for node in (0, 1)]
        while not list(tmp_path.glob(f".data.*.part/phases/{phase}-*/completions/*")):
            assert [process.poll() for process in started] == [None, None]
            time.sleep(0.05)
        for process in started:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    expected = alone(tmp_path, data)
    for tasks in (7, 32):
        ended = end([start(tmp_path, data, node, tasks) for node in (0, 1)])
        assert [code for code, _ in ended] == [0, 0], ended
        assert everything(tmp_path / "data") == expected
        os.rename(tmp_path / "data", tmp_path / f"by-{tasks}")
