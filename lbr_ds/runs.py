"""The layout of a run folder; which model a path means. Imports no torch.

RUN/recipe.yaml environment.json backbone/ eval/*.json
RUN/stage1/ stage2/   metrics.jsonl evaluations.jsonl starts.jsonl auto.json tensorboard/ log/
                      reduction.json trackers.json
                      checkpoints/step-000500/{state.json,files.json,state/,model/}

A checkpoint is whole when every file has the size and sha256 that its files.json says.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbr_ds.errors import CheckpointError, ConfigError
from lbr_ds.system.json_lines import read_rows
from lbr_ds.system.locate import cached_sha256, file_sha256

log = logging.getLogger(__name__)
_PARTS = re.compile(r"\.|backbone|stage[12](/checkpoints(/step-\d+(/model)?)?)?")  # of a run
BEST, LAST = "best", "last"  # checkpoints of a run or a stage
MEASURES = {1: "separation_ratio", 2: "ndcg_at_10"}  # by which a stage's best checkpoint is chosen
EVALUATIONS = "evaluations.jsonl"  # of a stage
MANIFEST = "files.json"  # of a checkpoint, a backbone, an export: {name: {"bytes", "sha256"}}


def saved(stage_folder: Path) -> list[Path]:
    """Every checkpoint of `RUN/stageN` that was saved to its end, oldest first; whole or damaged.

    One still being written has another name (`.part`).
    """
    found = (stage_folder / "checkpoints").glob("step-*")
    named = (p for p in found if re.fullmatch(r"step-\d+", p.name))
    return sorted(named, key=lambda p: int(p.name.removeprefix("step-")))


def checkpoints(stage_folder: Path, *, state: bool = False) -> list[Path]:
    """Return the checkpoints of `RUN/stageN` whose files have their full size, oldest first."""
    return [p for p in saved(stage_folder) if not fault(p, parts=0, state=state)]


def fault(checkpoint: Path, *, part: int = 0, parts: int = 1, state: bool = True) -> str:
    """Return what is wrong with a checkpoint's files, as `name: reason`; "" when it is complete.

    Sizes are always compared. Contents are read and compared for every `parts`-th file from `part`
    on, so that ranks can share the reading; parts=0 reads none. With state=False, `state/` may be
    missing: only a resume needs it.
    """
    files = _listed(checkpoint, state)
    if isinstance(files, str):
        return files
    if "state.json" not in files:
        return f"{MANIFEST}: lists no state.json"
    read = sorted(files)[part::parts] if parts else []
    return _compare(checkpoint, files, read, file_sha256)


def changed(folder: Path) -> str:
    """Return what changed in a folder since its files.json, as `name: reason`; "" for nothing.

    `state/` may be missing. A file is read once and then known by its times (`cached_sha256`). A
    folder without files.json has not changed.
    """
    files = _listed(folder, state=False)
    if isinstance(files, str):
        return files if (folder / MANIFEST).exists() else ""
    return _compare(folder, files, sorted(files), cached_sha256)


def seal_folder(folder: Path, leave: Sequence[str] = ()) -> None:
    """Write a folder's files.json, by which `changed` knows it: all files but those in `leave`."""
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() not in (MANIFEST, *leave)
    }
    (folder / MANIFEST).write_text(json.dumps(files, indent=2) + "\n", encoding="utf-8")


def _listed(folder: Path, state: bool) -> dict[str, tuple[int, str]] | str:
    """{name: (size, sha256)} of files.json, or what is wrong with it; state: with `state/`."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        kept = {n: v for n, v in listed.items() if state or not n.startswith("state/")}
        return {name: (int(is_["bytes"]), str(is_["sha256"])) for name, is_ in kept.items()}
    except FileNotFoundError:
        return f"{MANIFEST}: missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST}: not readable ({error})"


def _compare(
    folder: Path,
    files: dict[str, tuple[int, str]],
    read: Sequence[str],
    digest: Callable[[Path], str],
) -> str:
    """Return the first file whose size, or of those in `read` whose content, is not as listed."""
    try:
        for name, (size, _) in files.items():
            if (found := (folder / name).stat().st_size) != size:
                return f"{name}: {found} bytes, {size} were saved"
        for name in read:
            if digest(folder / name) != files[name][1]:
                return f"{name}: its contents have changed since it was saved (sha256)"
    except FileNotFoundError:
        return f"{name}: missing"
    except OSError as error:
        return f"{name}: not readable ({error.strerror})"
    return ""


def check_start(run: Path, source: str) -> None:
    """Check that what stage 2 starts from exists, without reading it, unless stage 2 can resume.

    Args:
        run: The run folder.
        source: The recipe's stage2.from.

    Raises:
        CheckpointError: There is no such checkpoint.
        ConfigError: There is no such folder, or it holds no model.
    """
    if saved(run / "stage2") or source == "backbone":
        return
    steps = [int(path.name.removeprefix("step-")) for path in saved(run / "stage1")]
    if source in ("best", "last"):
        found = bool(steps)
    else:
        found = int(source) in steps if source.isdigit() else bool(resolve_model(source).folder)
    if not found:
        raise no_start(run, source)


def no_start(run: Path, source: str) -> CheckpointError:
    """Return the error that stage2.from=`source` means no checkpoint of the run."""
    return CheckpointError(
        f"stage2.from={source}: no such checkpoint below {run / 'stage1'}; "
        "run `lbr-ds train RECIPE --stage 1` first, or set stage2.from=backbone"
    )


def step_of(checkpoint: Path) -> int:
    """Return the number of optimizer steps of a checkpoint."""
    return int(json.loads((checkpoint / "state.json").read_text())["step"])


def best_first(found: Sequence[Path]) -> list[Path]:
    """Those of `found` (checkpoints of a stage, oldest first) that were evaluated, the best first.

    By what was measured on held-out pairs as they were saved: the Separation Ratio in stage 1,
    nDCG@10 in stage 2. Of equals the newer is first. Only those judged on a sample of the newest
    one's size can be compared.
    """
    judged: list[tuple[tuple[int, int], float, Path]] = []
    for path in reversed(found):
        figures = evaluation(path)
        if (value := figures.get(MEASURES[_stage_of(path)])) is not None:
            judged.append(((figures["queries"], figures["passages"]), value, path))
    alike = [(value, path) for sample, value, path in judged if sample == judged[0][0]]
    return [path for _, path in sorted(alike, key=lambda pair: -pair[0])]


def _stage_of(checkpoint: Path) -> int:
    """Return the stage of a checkpoint; its folder is RUN/stageN/checkpoints/step-S."""
    return 2 if checkpoint.resolve().parent.parent.name == "stage2" else 1


def evaluation(checkpoint: Path) -> dict[str, Any]:
    """Return the figures of the evaluation at its step; {} without one or if not readable.

    If a signal prevented it, the resumed stage made it, and its figures are in the stage's file.
    """
    try:
        facts = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        stage, figures = checkpoint.resolve().parent.parent, facts.get("evaluation")
        return figures or evaluations(stage).get(facts["step"], {})
    except (OSError, ValueError, KeyError, AttributeError):
        return {}


def evaluations(stage_folder: Path) -> dict[int, dict[str, Any]]:
    """Return the figures of the evaluations during a stage, by step."""
    return {row.pop("step"): row for row in read_rows(stage_folder / EVALUATIONS)}


def model_folder(place: Path, checkpoint: str = BEST) -> Path:
    """Return the weights folder that `place` means, compared with its stored hashes.

    A run: a checkpoint of stage 2, else of stage 1, else the prepared backbone. A stage: one of its
    checkpoints. A checkpoint: its model. A weights folder: itself. Damaged checkpoints of a run or
    a stage are skipped with a log line.

    Args:
        place: A folder of one of these kinds.
        checkpoint: Of a run or a stage: best (see `best_first`; the newest where none has been
            evaluated), last, or a step.

    Raises:
        CheckpointError: There is none, all are damaged, or `place` itself is.
    """
    if not place.exists():
        raise CheckpointError(
            f"{place}: no such folder; give a run, a checkpoint or a model folder"
        )
    if (place / "lbr.json").is_file():
        own = place.name == "model" and (place.parent / "state.json").is_file()
        return _unchanged(place.parent if own else place, place)
    if (place / "state.json").is_file():
        return _unchanged(place, place / "model")
    for stage in (place, place / "stage2", place / "stage1"):
        if found := saved(stage):
            return _first_unchanged(_in_order(found, checkpoint)) / "model"
    if (place / "backbone" / "lbr.json").is_file():
        return _unchanged(place / "backbone", place / "backbone")
    raise CheckpointError(f"{place} holds no checkpoint; run `lbr-ds train` first")


def _unchanged(sealed: Path, folder: Path) -> Path:
    """`folder`, when nothing of `sealed` has changed. Raises CheckpointError otherwise."""
    if why := changed(sealed):
        ours = (sealed / "state.json").is_file()
        own = "" if ours else f", or, if the change is yours, remove its {MANIFEST}"
        raise CheckpointError(
            f"{sealed}: a file is missing or has changed ({why}); restore it from a copy, or use "
            f"another checkpoint{own}"
        )
    return folder


def _in_order(found: list[Path], checkpoint: str) -> list[Path]:
    """Return the checkpoints that `model_folder` tries, the first choice first."""
    if checkpoint == LAST:
        return found[::-1]
    if checkpoint == BEST:
        best = best_first(found)
        return best + [path for path in found[::-1] if path not in best]
    for path in found:
        if checkpoint.isdigit() and int(path.name.removeprefix("step-")) == int(checkpoint):
            return [path]
    steps = ", ".join(str(int(path.name.removeprefix("step-"))) for path in found)
    raise CheckpointError(
        f"{found[0].parent}: has no checkpoint {checkpoint!r}; give best, last, or one of {steps}"
    )


def checkpoint_name(folder: Path | None) -> str | None:
    """Return the name of the checkpoint that holds a model folder, such as step-000120, or None."""
    if folder is None or folder.name != "model" or not (folder.parent / "state.json").is_file():
        return None
    return folder.parent.name


def choice(folder: Path, checkpoint: str) -> str:
    """Describe a result of `model_folder` for the log: the checkpoint, and why it was chosen."""
    if checkpoint_name(folder) is None:
        return str(folder)
    name = MEASURES[_stage_of(folder.parent)]
    value = evaluation(folder.parent).get(name)
    held_out = "not evaluated" if value is None else f"held-out {name} {value:.3f}"
    return f"{folder.parent} ({checkpoint}: {held_out})"


def _first_unchanged(found: list[Path]) -> Path:
    """Return the first complete one of these checkpoints; log those before it."""
    for path in found:
        if not (why := changed(path) or fault(path, parts=0, state=False)):
            return path
        log.warning("%s is damaged and skipped: %s", path, why)
    raise CheckpointError(
        f"{found[0].parent}: all {len(found)} checkpoints are damaged ({found[-1].name}: {why}); "
        "restore one from a copy, or remove them and train the stage again"
    )


@dataclass(frozen=True)
class ResolvedModel:
    """A resolved model argument.

    Attributes:
        folder: Of the weights; None for a name.
        ours: Whether lbr-ds made the folder (it holds an lbr.json).
        packed: Whether the encoder of lbr-ds loads it; otherwise sentence-transformers does.
    """

    folder: Path | None
    ours: bool = False
    packed: bool = False


def resolve_model(model: str, checkpoint: str = BEST) -> ResolvedModel:
    """Resolve the model argument of a command: a folder, a run, a stage, a checkpoint, or a name.

    checkpoint: of a run or a stage, see `model_folder`.

    A folder with `modules.json` and a plain Hugging Face folder are for sentence-transformers; a
    run, a stage, a checkpoint or a model folder of lbr-ds is for its own encoder (`model_folder`).

    Raises:
        ConfigError: The folder is missing or holds no model.
        CheckpointError: The model is damaged.
    """
    folder = Path(model)
    if not folder.is_dir():
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise ConfigError(f"{model}: no such folder; give a folder, a run, or a model's name")
        return ResolvedModel(None)
    ours = (folder / "lbr.json").is_file()
    if (folder / "modules.json").is_file():
        return ResolvedModel(_unchanged(folder, folder) if ours else folder, ours)
    if not ours and (folder / "config.json").is_file():
        return ResolvedModel(folder)
    if ours or any(_holds(folder)):
        return ResolvedModel(model_folder(folder, checkpoint), ours=True, packed=True)
    raise ConfigError(
        f"{model}: holds no model (no modules.json, lbr.json or config.json, no checkpoint); "
        "give a run, a checkpoint or an exported folder"
    )


def _holds(folder: Path) -> Iterator[object]:
    """Yield what makes a folder a checkpoint, a stage or a run that holds a model."""
    yield (folder / "state.json").is_file()
    yield from (saved(stage) for stage in (folder, folder / "stage2", folder / "stage1"))
    yield (folder / "backbone" / "lbr.json").is_file()


def run_of(place: Path) -> Path | None:
    """Return the run folder that `place` is or is a part of: a stage, a checkpoint, its model.

    A recipe.yaml in an unrelated parent folder does not count. Returns None without a run.
    """
    for folder in (place, *place.resolve().parents):
        if (folder / "recipe.yaml").is_file():
            inside = place.resolve().relative_to(folder.resolve()).as_posix()
            parts = [(folder / name).is_dir() for name in ("backbone", "stage1", "stage2")]
            if any(parts) and _PARTS.fullmatch(inside):
                return folder
    return None
