"""A tiny project in which every verb runs in a fork of this process, whose imports are done."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lbr_ds.demo
import lbr_ds.reproduce
from lbr_ds.cli import app
from lbr_ds.errors import ConfigError, LbrError
from tests.kills.crash import run, tree
from tests.synthesis.server import Server
from tests.tiny import tiny_recipe

# A user's own files, beside everything that the verbs write. None may ever be touched.
FOREIGN = {
    "data.part/mine": "a folder with a name that an earlier version used",
    "model.part/mine": "the same",
    ".data.lbr-note": "a name that only begins like one of ours",
    ".data.lbr-0123abcd.part/mine": "a folder of that name which holds no marker",
    ".report.json.part": "a hidden file",
    "data.mining/mine/notes": "a folder among those of vectors",
    "run/notes.txt": "a file in the run folder",
    "run/stage1/notes.txt": "another",
}
# What differs between two runs of the same work: clocks, their quotients, and memory in use.
TIMED = {
    "seconds",
    "step_seconds",
    "save_seconds",
    "data_wait_seconds",
    "tokens_per_second",
    "samples_per_second",
    "memory_gib",
    "rank_seconds",
    "straggler",
    "data_wait_share",
    "peak_memory_gib",
    "stage1_seconds",
}
# Libraries that verbs import where they need them.
_IMPORTED_LATE = (
    "matplotlib.pyplot",
    "peft",
    "py3langid",
    "sentence_transformers",
    "torch._dynamo",
    "webdataset",
)
# Logs with times of day; lines of starts, of which a run that was killed has more.
LOGS = re.compile(r"(^|/)(log|tensorboard)/[^/]+$|(^|/)starts\.jsonl$")


@dataclass(frozen=True)
class Verb:
    """A verb and its arguments."""

    name: str
    arguments: str  # {}: the project's folder; {server}: of a language model
    needs: tuple[str, ...] = ()  # the verbs before it

    def __call__(self, place: Path) -> None:
        """Run it in this process, as the command line does."""
        os.chdir(place)
        words = shlex.split(
            self.arguments.replace("{}", str(place)).replace("{server}", SERVER.url)
        )
        lbr_ds.demo.run_verb = lbr_ds.reproduce.run_verb = _run_in_fork  # no new interpreter
        try:
            code = app(words, standalone_mode=False)
        except ConfigError as error:
            # A finished export is refused; what the killed process left beside it is removed.
            code = self.name != "export" or "exists and is not empty" not in str(error)
        if code:
            raise SystemExit(code)


def warm_up() -> None:
    """Import what the verbs need, so that no fork has to; the tests' language model answers."""
    SERVER.__enter__()
    for room in (
        "evaluation.evaluation",
        "exporting",
        "mining.mine",
        "plan.table",
        "report",
        "synthesis.synthesize",
        "training.loop",
    ):
        importlib.import_module(f"lbr_ds.{room}")
    for library in _IMPORTED_LATE:
        importlib.import_module(library)


def _run_in_fork(*words: str) -> None:
    child = os.fork()
    if child == 0:
        try:
            code = int(app(list(words), standalone_mode=False) or 0)
        except LbrError as error:
            print(error, flush=True)
            code = error.exit_code
        os._exit(code)
    _, status = os.waitpid(child, 0)
    if status:
        error = LbrError(f"stopped at `lbr-ds {' '.join(words)}`")
        error.exit_code = os.waitstatus_to_exitcode(status)
        raise error


VERBS = {
    verb.name: verb
    for verb in (
        Verb("init", "init {}/project"),
        Verb("plan", "plan {}/recipe.yaml --nodes 1 --gpus 2 --json {}/plan.json"),
        Verb("prepare", "prepare {}/recipe.yaml"),
        Verb("mine", "mine {}/recipe.yaml", ("prepare",)),
        Verb(
            "prepare-passages",
            "prepare {}/recipe.yaml data.sources='[{path: {}/passages.jsonl, name: passages}, "
            "{path: {}/corpus.jsonl, name: made-up, role: eval}]'",
        ),
        Verb(
            "synthesize",
            "synthesize {}/recipe.yaml --url {server} --model writer synthesis.keep_rank=5",
            ("prepare-passages",),
        ),
        Verb("train-1", "train {}/recipe.yaml --stage 1", ("prepare", "mine")),
        Verb("train-2", "train {}/recipe.yaml --stage 2", ("prepare", "mine", "train-1")),
        Verb("export", "export {}/run {}/model", ("prepare", "mine", "train-1", "train-2")),
        Verb("eval", "eval {}/run --data {}/data", ("prepare", "mine", "train-1", "train-2")),
        Verb("report", "report {}/run", ("prepare", "mine", "train-1", "train-2", "eval")),
        Verb(
            "reproduce",
            "reproduce table2 {}/recipe.yaml stage1.num_steps=2 stage2.num_steps=2 every.save=1 "
            "--json {}/table.json",
        ),
        Verb(
            "demo",
            "demo --out {}/demo --nproc 1 model.backbone={}/backbone model.num_layers=1 "
            "model.max_length=32 data.sources='[{path: {}/corpus.jsonl, name: made-up}]' "
            "stage1.num_steps=2 stage2.num_steps=2 stage1.samples_per_step=8 "
            "stage2.samples_per_step=8 every.save=1 bottleneck.count=2",
        ),
    )
}


def _passage(number: int) -> str:
    return f"Disease{number} comes with fever{number % 7}, cough{number % 11} and pain."


def _queries(passage: str, request: dict[str, Any]) -> str:
    name = passage.split()[0]
    return f"1. what does {name.lower()} do?\n2. Which fever comes with {name}?"


SERVER = Server(_queries)


@dataclass
class World:
    """The project at one path, and its states after each chain of verbs in `saved`."""

    saved: Path
    place: Path
    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)  # operations on files

    @classmethod
    def at(cls, folder: Path, count: int = 120) -> World:
        """A new project below `folder`, with so many records."""
        world = cls(folder / "saved", folder / "place")
        changes = {"every__save": 2, "stage1__num_steps": 4, "stage2__num_steps": 4}
        run(lambda: tiny_recipe(world.place, count=count, prepared=False, **changes))
        passages = ({"text": _passage(number)} for number in range(count))
        lines = (json.dumps(passage) + "\n" for passage in passages)
        (world.place / "passages.jsonl").write_text("".join(lines))
        for name, text in FOREIGN.items():
            (world.place / name).parent.mkdir(parents=True, exist_ok=True)
            (world.place / name).write_text(text)
        world.save("new")
        return world

    def save(self, name: str) -> None:
        """Keep the state that the project is in."""
        shutil.rmtree(self.saved / name, ignore_errors=True)
        shutil.copytree(self.place, self.saved / name, symlinks=True)

    def before(self, verb: Verb) -> None:
        """Bring the project into the state in which `verb` is run."""
        state = self.saved / ("-".join(verb.needs) or "new")
        if not state.exists():
            *earlier, last = verb.needs
            self.before(Verb("", "", tuple(earlier)))
            run(lambda: VERBS[last](self.place))
            self.save(state.name)
            return
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(state, self.place, symlinks=True)

    def undisturbed(self, verb: Verb) -> dict[str, Any]:
        """What the project holds after `verb`; notes its seconds and its operations on files."""
        self.before(verb)
        began = time.monotonic()
        count = run(lambda: verb(self.place))
        assert count is not None
        self.seconds[verb.name], self.counts[verb.name] = time.monotonic() - began, count
        return self.contents()

    def contents(self) -> dict[str, Any]:
        """Every file and folder by name, without what may differ (TIMED, LOGS)."""
        found = tree(self.place)
        return {n: _untimed(n, data) for n, data in found.items() if not LOGS.search(n)}

    def kill(self, verb: Verb, draw: random.Random) -> bool:
        """Run `verb` and kill it at an instant drawn from its duration; whether it was killed."""
        child = os.fork()
        if child == 0:
            os.setsid()
            try:
                verb(self.place)
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0, self.seconds[verb.name]))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        return os.WIFSIGNALED(status)


def _untimed(name: str, data: bytes | None) -> Any:
    """A file's contents; those with times in them are parsed and lose these."""
    if data is None or not name.endswith((".json", ".jsonl", ".md", ".html")):
        return data
    text = data.decode()
    if name.endswith((".md", ".html")):
        # The demo trains too, so its report shows times, and its HTML the curves of these; `report`
        # alone is compared to the byte.
        if name == "demo/report.html":
            return text[-8:]
        return re.sub(r"\d[\d.,e+-]*", "0", text) if name.startswith("demo/") else text
    lines = text.splitlines() if name.endswith(".jsonl") else [text]
    if name.startswith("data.synthesis/"):
        lines.sort()  # the order in which requests that run side by side were answered
    values = [_drop(json.loads(line)) for line in lines]
    if name.endswith("/files.json"):
        values[0].pop("state.json", None)  # the size and hash of a file with times
    return json.dumps(values)


def _drop(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _drop(v) for k, v in value.items() if k not in TIMED}
    return [_drop(v) for v in value] if isinstance(value, list) else value


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names that differ, with what they differ in."""
    lines = [f"missing: {name}" for name in expected.keys() - found.keys()]
    lines += [f"left over: {name}" for name in found.keys() - expected.keys()]
    lines += [f"differs: {n}" for n in expected.keys() & found.keys() if expected[n] != found[n]]
    return sorted(lines)
