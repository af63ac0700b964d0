"""Send the recipe, metrics and tables of a stage to TensorBoard, Weights & Biases and MLflow.

Rank 0 only. TensorBoard writes files to RUN/stageN/tensorboard. wandb and mlflow are called through
accelerate's trackers, in a thread of their own: a server that is slow or down makes no step wait,
and an error is a warning. metrics.jsonl and evaluations.jsonl have everything in any case.

Each stage is a run of the tracker. Its id is stored in RUN/stageN/trackers.json, so a resumed stage
continues that run, and steps that were written before it was stopped are not sent again. Where the
server is, and who logs in, is read from the environment by the libraries themselves
(WANDB_API_KEY, WANDB_MODE, MLFLOW_TRACKING_URI, ...); nothing of it is stored.

This is the only module that imports tensorboard or accelerate.
"""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
import queue
import tempfile
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from lbr_ds.config import RunConfig
from lbr_ds.errors import EnvironmentProblem, short
from lbr_ds.system.atomic import write_json
from lbr_ds.system.masking import mask_secrets

log = logging.getLogger(__name__)
NAME = "trackers.json"
# The project of wandb and the experiment of MLflow, unless the environment names another.
PROJECT = "lbr-ds"
Rows = Sequence[Sequence[str | int | float]]
_WAITING = 10_000  # messages that may wait for a slow server; later ones are dropped
_PATIENCE = 60  # seconds that the end of a stage waits for what was not sent yet


def check_packages(names: Sequence[str]) -> None:
    """Raise EnvironmentProblem if a package that `every.trackers` needs is missing."""
    for name in names:
        wanted = () if name == "tensorboard" else ("accelerate", name)
        missing = [package for package in wanted if find_spec(package) is None]
        if missing:
            raise EnvironmentProblem(
                f"every.trackers: {name} needs the package {' and '.join(missing)}; pip install "
                f"{' '.join(missing)}, or remove it from the list"
            )


class Tracker(Protocol):
    """What a stage sends; steps do not decrease."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers by name."""

    def table(self, name: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        """Send a table of texts and numbers."""

    def close(self) -> None:
        """Send what is left."""


class Trackers:
    """The trackers of one stage: `open`, then `scalars` and `table`, then `close`.

    Attributes:
        sent: {kind: last step} that an earlier start of this stage has written.
    """

    def __init__(self, run: RunConfig, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.sent: Mapping[str, int] = {}
        self._first: dict[str, bool] = {}  # whether the tracker's run begins now
        self._open: dict[str, Tracker] = {}

    def open(self, start: int) -> None:
        """Open all trackers of the recipe; the stage continues after step `start`."""
        path = self.folder / NAME
        ids = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for name in dict.fromkeys(self.run.every.trackers):
            self._first[name] = name == "tensorboard" or name not in ids
            if name == "tensorboard":
                self._open[name] = _TensorBoard(self.run, self.folder / name, start)
            else:
                make = {"wandb": _wandb, "mlflow": _mlflow}[name]
                self._open[name] = InBackground(name, make(self.run, self.folder, ids.get(name)))

    def scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """Send numbers to all trackers that do not have them."""
        for tracker in self._due(kind, step):
            tracker.scalars(values, step)

    def table(self, kind: str, name: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        """Send a table to all trackers that do not have it."""
        for tracker in self._due(kind, step):
            tracker.table(name, columns, rows, step)

    def _due(self, kind: str, step: int) -> list[Tracker]:
        before = step <= self.sent.get(kind, 0)
        return [t for name, t in self._open.items() if self._first[name] or not before]

    def close(self) -> None:
        """Send what is left and close."""
        while self._open:
            self._open.popitem()[1].close()


class _TensorBoard:
    """Event files; those of steps after `start` are replaced."""

    def __init__(self, run: RunConfig, folder: Path, start: int) -> None:
        self._board = SummaryWriter(folder, purge_step=start + 1)
        recipe = run.dump().replace("\n", "\n    ")  # indented: a code block of Markdown
        self._board.add_text("recipe", f"    {recipe}", start)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def table(self, name: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        cells = ([str(c).replace("|", "\\|").replace("\n", " ") for c in line] for line in lines)
        self._board.add_text(name, "\n".join("|" + "|".join(line) + "|" for line in cells), step)

    def close(self) -> None:
        self._board.close()


class InBackground:
    """A tracker of accelerate in a thread of its own, which also opens it.

    MLflow's active run belongs to a thread, so all calls are made there. A message that fails is
    reported and dropped: the first one as a warning with the error, the others as a count.

    Args:
        name: For messages.
        start: Returns the started tracker of accelerate. Called again after a failure.
    """

    def __init__(self, name: str, start: Callable[[], Any]) -> None:
        self.name, self._start = name, start
        self._failed = 0
        self._queue: queue.Queue[Callable[[Any], None] | None] = queue.Queue(_WAITING)
        self._thread = threading.Thread(target=self._send_all, name=name, daemon=True)
        self._thread.start()
        self._put(lambda tracker: None)  # opens it now

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers by name."""
        plain = dict(values)
        self._put(lambda tracker: tracker.log(plain, step=step))

    def table(self, name: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        """Send a table, or a CSV file where the tracker has no tables (MLflow)."""

        def send(tracker: Any) -> None:
            if hasattr(tracker, "log_table"):
                data = [list(row) for row in rows]
                tracker.log_table(name, columns=list(columns), data=data, step=step)
                return
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"step-{step:06d}.csv"
                with path.open("w", encoding="utf-8", newline="") as file:
                    csv.writer(file).writerows([columns, *rows])
                tracker.log_artifact(str(path), name)

        self._put(send)

    def close(self) -> None:
        """Send what is left, for as long as _PATIENCE, and report what was not sent."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=1)
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            log.warning("%s does not answer: messages that wait for it are lost", self.name)
        if self._failed:
            log.warning(
                "%d messages were not sent to %s; metrics.jsonl has all metrics",
                self._failed,
                self.name,
            )

    def _put(self, message: Callable[[Any], None]) -> None:
        try:
            self._queue.put_nowait(message)
        except queue.Full:
            self._fail(f"{_WAITING} messages wait for it already")

    def _send_all(self) -> None:
        tracker = None
        while (message := self._queue.get()) is not None:
            try:
                tracker = self._start() if tracker is None else tracker
                message(tracker)
            # A library and a server that are not ours: whatever they raise, training continues.
            except Exception as error:
                self._fail(f"{type(error).__name__}: {error}")
        if tracker is not None:
            try:
                tracker.finish()
            except Exception as error:
                self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, why: str) -> None:
        self._failed += 1
        if self._failed == 1:
            text = short(mask_secrets(why), 300)
            log.warning("%s: %s; training continues without it", self.name, text)


def _wandb(run: RunConfig, folder: Path, known: str | None) -> Callable[[], Any]:
    """Return what starts accelerate's tracker of wandb, in run `known` or a new one."""
    own = known or uuid.uuid4().hex[:12]
    if known is None:
        _remember(folder, "wandb", own)

    def start() -> Any:
        import wandb
        from accelerate.tracking import WandBTracker

        # The console and the command line, where secrets may be, are not sent.
        settings = wandb.Settings(
            console="off", disable_code=True, disable_git=True, x_disable_meta=True, quiet=True
        )
        tracker = WandBTracker(
            os.environ.get("WANDB_PROJECT", PROJECT),
            id=own,
            resume="allow",
            name=f"{run.run.name}/{folder.name}",
            group=run.run.name,
            dir=str(folder),
            settings=settings,
        )
        tracker.start()
        tracker.store_init_configuration(settings_of(run))
        log.info("wandb: run %s in %s", own, tracker.run.url or tracker.run.dir)
        return tracker

    return _with_state(start)


def _mlflow(run: RunConfig, folder: Path, known: str | None) -> Callable[[], Any]:
    """Return what starts accelerate's tracker of MLflow, in run `known` or a new one."""

    def start() -> Any:
        from accelerate.tracking import MLflowTracker

        tracker = MLflowTracker(PROJECT, run_id=known, run_name=f"{run.run.name}/{folder.name}")
        tracker.start()
        own = tracker.tracker.info.run_id
        if known is None:
            _remember(folder, "mlflow", own)
            tracker.store_init_configuration(settings_of(run))  # MLflow refuses to change them
            tracker.log_artifact(str(run.run / "recipe.yaml"))
        log.info("mlflow: run %s", own)
        return tracker

    return _with_state(start)


def _with_state(start: Callable[[], Any]) -> Callable[[], Any]:
    """Return `start` after accelerate's state exists, which its trackers need for their log lines.

    With a device named, accelerate only looks at the process group and sets no CUDA device.
    """

    def started() -> Any:
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
        from accelerate import PartialState

        PartialState()
        return start()

    return started


def _remember(folder: Path, name: str, own: str) -> None:
    """Store the id of a tracker's run."""
    with _LOCK:
        path = folder / NAME
        ids = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        write_json(path, {**ids, name: own}, indent=2)


_LOCK = threading.Lock()


def settings_of(run: RunConfig) -> dict[str, str | int | float | bool | None]:
    """Return the resolved recipe as {"stage2.temperature": 0.02, ...}, without secrets.

    Lists become JSON.
    """
    flat: dict[str, Any] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                add(f"{prefix}.{key}" if prefix else key, inner)
        elif isinstance(value, (dict, list)):
            flat[prefix] = mask_secrets(json.dumps(value))
        else:
            flat[prefix] = mask_secrets(value) if isinstance(value, str) else value

    add("", json.loads(run.model_dump_json(by_alias=True)))
    return flat
