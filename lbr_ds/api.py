"""The commands as Python functions. Each takes a recipe, or the folder that a command takes.

Heavy libraries are imported inside the functions: this module imports no torch.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbr_ds.config import RunConfig, load
from lbr_ds.errors import SAVED_AND_STOPPED, EnvironmentProblem, LbrError, TrainingError

if TYPE_CHECKING:
    from lbr_ds.corpora.nodes import Spread

Recipe = RunConfig | str | Path


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load a recipe and check it.

    Args:
        recipe: A YAML file, or the name of a recipe that comes with the package, such as "demo".
        overrides: Changes as on the command line, such as "stage1.optim.lr=1e-5".

    Returns:
        The resolved recipe, a frozen pydantic model.

    Raises:
        ConfigError: A key is unknown, or a value is out of its range.
    """
    return load(recipe, list(overrides))


def prepare(recipe: Recipe, *, spread: Spread | None = None) -> dict[str, Any]:
    """Make the recipe's data folder, or reuse it when it was made from the same sources.

    Args:
        recipe: A recipe, or what `load_recipe` takes.
        spread: This process's place among several nodes that share the work by datatrove (extra
            `engine`); the same bytes result. None: this process does all of it.

    Returns:
        The content of curation.json, and "reused"; nothing on another node than the first.

    Raises:
        ConfigError: The data folder holds something else.
        DataError: A source cannot be read, or a split cannot be filled.
    """
    from lbr_ds.corpora.prepare import prepare as prepare_data
    from lbr_ds.system.progress import show_progress

    run = _loaded(recipe)
    with show_progress() as progress, _spread(run.data.local_folder, spread) as first:
        if not first:
            return {}
        return prepare_data(
            run.data,
            run.seed,
            progress,
            run.model,
            run.bottleneck.count,
            run.separates_sources,
        )


@contextlib.contextmanager
def _spread(folder: Path, spread: Spread | None) -> Iterator[bool]:
    """Share the work inside with other nodes; yields False on those, at the end of the work."""
    if spread is None:
        yield True
        return
    try:
        from lbr_ds.corpora import engine
    except ModuleNotFoundError as error:
        raise EnvironmentProblem(
            f"--engine datatrove needs {error.name}; pip install 'lbr-ds[engine]'"
        ) from None
    if spread.node:
        engine.assist(folder, spread)
        yield False
        return
    with engine.leading(folder, spread):
        yield True


def train(recipe: Recipe, stage: int, *, nproc: int | None = None, force: bool = False) -> Path:
    """Train one stage to its end, from the newest checkpoint of the run folder if there is one.

    Args:
        recipe: A recipe, or what `load_recipe` takes.
        stage: 1 (learn, IB-GL) or 2 (represent, CL).
        nproc: The number of rank processes that are started on this machine; None: one per GPU. In
            a process that srun or torchrun has started leave it out: this process is one rank.
        force: Whether to resume even if the recipe or the data changed.

    Returns:
        The newest checkpoint.

    Raises:
        LbrError: With one line that names the place and the cure. Ranks that were started here
            have written that line to stderr, and the error has their exit code.
    """
    from lbr_ds.runs import checkpoints
    from lbr_ds.training.launch import ranks_to_start

    run = _loaded(recipe)
    if count := ranks_to_start(nproc, run.stage(stage).samples_per_step):
        code = _launch(run, stage, count, force)
        if code not in (0, SAVED_AND_STOPPED):
            raise _with_code(TrainingError(f"stage {stage}: a rank ended with code {code}"), code)
        complete = code == 0
    else:
        from lbr_ds.training.loop import train as train_stage

        complete = train_stage(run, stage, force=force)
    if not complete:
        raise _with_code(
            TrainingError(f"stage {stage}: saved and stopped by a signal; train it again"),
            SAVED_AND_STOPPED,
        )
    return checkpoints(run.run / f"stage{stage}")[-1]


def evaluate(
    model: str | Path,
    data: str | Path | None = None,
    tasks: Sequence[str] = (),
    general: str | Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Score retrieval with MTEB on the held-out split of prepared data, or on official tasks.

    Args:
        model: A run, a checkpoint, an export, "bm25", or a name that MTEB knows.
        data: A prepared folder or its URL.
        tasks: Names of official tasks or benchmarks, such as "NFCorpus".
        general: Another prepared folder, of texts outside the domain, scored beside `data`.
        options: Fields of `lbr_ds.evaluation.EvalOptions`, such as `max_queries=200`.

    Returns:
        The scores, as `lbr-ds eval` writes them.

    Raises:
        LbrError: With one line that names the place and the cure.
    """
    from lbr_ds.evaluation import EvalOptions
    from lbr_ds.evaluation import evaluate as score

    chosen = EvalOptions(**options)
    return score(str(model), data=data, general=general, tasks=tasks, options=chosen)


def export(run: str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """Export a run or a checkpoint to a folder that sentence-transformers and servers load.

    Args:
        run: A run folder, or one checkpoint of it.
        out: A new folder.
        options: What `lbr_ds.exporting.export` takes besides: `checkpoint`, `causal_lm`,
            `onnx`, `int8`, `bottleneck`.

    Returns:
        The content of parity.json: texts, the trainer's vectors, and the largest difference.
    """
    from lbr_ds.exporting import export as export_model

    return export_model(Path(run), Path(out), **options)


def _loaded(recipe: Recipe) -> RunConfig:
    return recipe if isinstance(recipe, RunConfig) else load(recipe, [])


def _launch(run: RunConfig, stage: int, nproc: int, force: bool) -> int:
    """Start the ranks with the resolved recipe in a file of its own; return their exit code."""
    from lbr_ds.training.launch import launch_training

    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(run.dump(), encoding="utf-8")
        data = f"data.folder={run.data.folder}"  # a URL's password is not in the file
        return launch_training(recipe, stage, nproc, overrides=[data], force=force)


def _with_code(error: LbrError, code: int) -> LbrError:
    error.exit_code = code
    return error
