"""Trackers get everything once, never stop or delay a training, and store no secret."""

from __future__ import annotations

import json
import logging
import shutil
import struct
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lbr_ds.config import RunConfig, load
from lbr_ds.errors import EnvironmentProblem
from lbr_ds.evaluation.judgements import Judgements
from lbr_ds.evaluation.retrieval_metrics import rank_scores
from lbr_ds.runs import checkpoints
from lbr_ds.training import trackers
from lbr_ds.training.held_out import EXAMPLE_COLUMNS, examples
from lbr_ds.training.trackers import InBackground, check_packages, settings_of
from tests.ranks import run_cli


class Lines(GeneralTracker):
    """A tracker as accelerate defines them, which keeps what it gets and fails on request."""

    name = "lines"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Any] = []
        self.threads: set[str] = set()
        self.finished = False

    @property
    def tracker(self) -> list[Any]:
        return self.lines

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.lines.append(values)

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.threads.add(threading.current_thread().name)
        if values.get("loss", 0) < 0:
            raise ConnectionError("refused by http://me:hunter2@server/")
        self.lines.append((step, values))

    def log_table(self, name: str, columns: Any, data: Any, step: int) -> None:
        self.lines.append((step, name, columns, data))

    def finish(self) -> None:
        self.finished = True


def test_messages_arrive_in_order_and_a_failure_is_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made, starts = Lines(), []

    def start() -> Lines:
        starts.append(0)
        if len(starts) < 3:
            raise TimeoutError("no server")
        return made

    with caplog.at_level(logging.WARNING, "lbr_ds"):
        sent = InBackground("lines", start)  # opened in vain once, and again by the first message
        for step, loss in enumerate((5.0, 4.0, -1.0, 3.0), 1):
            sent.scalars({"loss": loss}, step)
        sent.table("retrieval", ["a", "b"], [["x", 1]], 4)
        sent.close()
    assert made.lines == [
        (2, {"loss": 4.0}),
        (4, {"loss": 3.0}),
        (4, "retrieval", ["a", "b"], [["x", 1]]),
    ]
    assert made.finished
    assert made.threads == {"lines"}
    first, last = caplog.messages
    assert first == "lines: TimeoutError: no server; training continues without it"
    assert last.startswith("3 messages were not sent to lines")


def test_errors_of_a_server_show_no_password(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lbr_ds"):
        sent = InBackground("lines", Lines)
        sent.scalars({"loss": -1.0}, 1)
        sent.close()
    assert "refused by http://server/" in caplog.text
    assert "hunter2" not in caplog.text


def test_a_server_that_hangs_delays_neither_steps_nor_the_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "_PATIENCE", 0.05)
    monkeypatch.setattr(trackers, "_WAITING", 10)
    hangs = threading.Event()
    with caplog.at_level(logging.WARNING, "lbr_ds"):
        sent = InBackground("lines", hangs.wait)
        for step in range(20):
            sent.scalars({"loss": 1.0}, step)
        sent.close()
    hangs.set()
    assert "10 messages wait for it already" in caplog.text
    assert "does not answer" in caplog.text


@pytest.mark.skipif(bool(find_spec("wandb")), reason="wandb is installed")
def test_a_missing_package_is_named() -> None:
    with pytest.raises(EnvironmentProblem, match="wandb; pip install wandb, or remove it"):
        check_packages(["tensorboard", "wandb"])


def test_hyper_parameters_are_the_resolved_recipe_without_secrets(trained: RunConfig) -> None:
    run = load(
        trained.run / "recipe.yaml", ["data.sources=[{path: https://me:hunter2@host/a.jsonl}]"]
    )
    found = settings_of(run)
    assert found["stage2.temperature"] == run.stage2.temperature
    assert found["every.trackers"] == '["tensorboard"]'
    assert "https://host/a.jsonl" in str(found["data.sources"])
    assert "hunter2" not in json.dumps(found)


def test_retrieved_passages_are_those_that_are_scored() -> None:
    rng = np.random.default_rng(0)
    judged = Judgements(
        {f"q{i}": f"query {i}" for i in range(8)},
        {f"d{i}": f"passage {i}" for i in range(40)},
        {f"q{i}": {f"d{i}": 1, f"d{i + 8}": 1} for i in range(8)},
    )
    vectors = rng.normal(size=(48, 5))
    rows = examples(vectors, judged, 0)
    assert sorted(row[0] for row in rows) == sorted(judged.queries.values())
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for query, answer, rank, *found in rows:
        i = int(str(query).split()[1])
        cosines = unit[8:] @ unit[i]
        best = max((i, i + 8), key=cosines.__getitem__)
        assert answer == f"passage {best}"
        assert rank == 1 + (cosines > cosines[best]).sum()
        assert found == [f"{cosines[d]:.3f} passage {d}" for d in np.argsort(-cosines)[:3]]
    within = sum(row[2] <= 10 for row in rows)
    assert (rank_scores(*np.split(vectors, [8]), judged)["recall_at_10"] > 0) == (within > 0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_tensorboard_shows_the_recipe_and_what_is_retrieved(trained: RunConfig, stage: int) -> None:
    board = EventAccumulator(str(trained.run / f"stage{stage}" / "tensorboard"))
    board.Reload()
    *_, recipe = board.Tensors("recipe/text_summary")  # one for each start of the stage
    assert "samples_per_step" in recipe.tensor_proto.string_val[0].decode()
    tables = board.Tensors("retrieval/text_summary")
    assert [event.step for event in tables] == [3, 6]
    head, _, *rows = tables[-1].tensor_proto.string_val[0].decode().splitlines()
    assert head == "|" + "|".join(EXAMPLE_COLUMNS) + "|"
    assert len(rows) == 8


def train_twice(recipe: Path, **env: str) -> tuple[Path, list[dict[str, Any]]]:
    """Train stage 2 with both trackers on two ranks, lose the last checkpoint, and resume.

    Returns its folder and the lines of metrics.jsonl.
    """
    run = load(recipe)
    folder = run.run / "stage2"
    shutil.rmtree(folder)
    # Every process takes the packages of this one: `pytest` may run with more on its path.
    for again in (False, True):
        if again:
            shutil.rmtree(checkpoints(folder)[-1])
        done = run_cli(
            "train",
            str(recipe),
            "--stage",
            "2",
            "--nproc",
            "2",
            "every.trackers=[tensorboard,wandb,mlflow]",
            WANDB_MODE="offline",
            WANDB_API_KEY="0123456789abcdef" * 2 + "01234567",
            **env,
        )
        assert done.returncode == 0, done.stderr
        assert "training continues without it" not in done.stderr, done.stderr
    return folder, [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def stored_records(path: Path) -> Iterator[bytes]:
    """The records of wandb's offline file: 7 bytes, then a log in LevelDB's format.

    A record is in one or more parts (checksum 4, length 2, type 1: whole, first, middle, last), and
    no part crosses the border of a block of 32 KiB.
    """
    data, place, block, record = path.read_bytes(), 7, 1 << 15, b""
    while place + 7 <= len(data):
        if block - place % block < 7:  # padding
            place += block - place % block
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


@pytest.mark.slow
def test_a_resumed_stage_continues_its_run_offline(copied: Path, tmp_path: Path) -> None:
    """Run with wandb and mlflow installed; both store files, which are read back."""
    wandb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("tests", artifact_location=str(tmp_path / "artifacts"))
    folder, lines = train_twice(
        copied,
        MLFLOW_TRACKING_URI=uri,
        MLFLOW_EXPERIMENT_NAME="tests",
    )
    ids = json.loads((folder / "trackers.json").read_text())

    (found,) = client.search_runs([experiment])
    assert found.info.run_id == ids["mlflow"]
    assert found.data.params["stage2.num_steps"] == str(load(copied).stage2.num_steps)
    history = client.get_metric_history(ids["mlflow"], "loss")
    assert [(m.step, m.value) for m in history] == [(x["step"], x["loss"]) for x in lines]
    scored = client.get_metric_history(ids["mlflow"], "evaluation/ndcg_at_10")
    assert [m.step for m in scored] == [3, 6]
    kept = [a.path for a in client.list_artifacts(ids["mlflow"], "retrieval")]
    assert kept == ["retrieval/step-000003.csv", "retrieval/step-000006.csv"]

    logged: list[tuple[int, dict[str, Any]]] = []
    config: set[str] = set()
    segments = sorted((folder / "wandb").glob(f"offline-run-*-{ids['wandb']}"))
    assert len(segments) == 2
    for segment in segments:
        for data in stored_records(next(segment.glob("*.wandb"))):
            record = wandb.Record.FromString(data)
            config |= {item.key for item in record.config.update} | {
                item.key for item in record.run.config.update
            }
            if record.HasField("history"):
                items = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                logged.append((record.history.step.num, items))
    losses = [(step, items["loss"]) for step, items in logged if "loss" in items]
    assert losses == [(x["step"], x["loss"]) for x in lines]
    assert [step for step, items in logged if "evaluation/ndcg_at_10" in items] == [3, 6]
    assert [s for s, items in logged if "retrieval/_type" in items] == [3, 6]
    assert "stage2.temperature" in config
    for path in folder.parent.rglob("*"):
        if path.is_file():
            assert b"0123456789abcdef0123456789abcdef" not in path.read_bytes(), path
