"""Check what a stage starts from, and record in each checkpoint what it was trained on.

At the start of a stage rank 0 writes `lineage.json` and `trained.u64` into RUN/stageN: the records
of the weights that it starts from, plus this stage and its data. Every checkpoint copies them from
there, so preparing the data again during a training changes neither.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from lbr_ds import lineage
from lbr_ds.config import STAGES, RunConfig
from lbr_ds.corpora.curate import trained_texts
from lbr_ds.distributed import World
from lbr_ds.errors import CheckpointError, DataError
from lbr_ds.lineage import Backbone, Dataset, Lineage, Training, identify
from lbr_ds.runs import saved
from lbr_ds.training.checkpoint.writing import link_files

log = logging.getLogger(__name__)
FILES = (lineage.NAME, trained_texts.NAME)
# Keys of a config.json that do not change a model's output.
_IRRELEVANT_KEYS = (
    "_name_or_path",
    "transformers_version",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "use_cache",
)


def weights_of(origin: Path) -> Path:
    """Return the model folder of a checkpoint; a folder of weights is returned as it is."""
    return origin / "model" if (origin / "model").is_dir() else origin


def backbone_now(run: RunConfig) -> Backbone | None:
    """Identify the recipe's backbone by content; None when that would need a download."""
    known = lineage.load(run.run / "backbone")
    return identify(run.model, known.backbone if known else None)


def same_backbone(run: RunConfig, origin: Path) -> bool:
    """Return whether `origin` is known to come from the recipe's backbone, wherever that is now."""
    was, now = lineage.load(weights_of(origin)), backbone_now(run)
    return bool(was and was.backbone and now and not was.backbone.differences(now))


def check_origin(
    run: RunConfig, origin: Path, world: World, *, prepared: bool, force: bool
) -> None:
    """Compare what a stage starts from with the recipe's backbone, tokenizer and bottleneck.

    All ranks call it twice: before the backbone is prepared, so that nothing in the run folder has
    changed when it raises, and after (`prepared`), for weights without lineage, which are compared
    with the prepared backbone.

    Raises:
        CheckpointError: They differ; the first difference is named. With `force` all differences
            are logged instead.
    """
    reasons = world.share(_differences(run, origin, prepared) if world.first else [])
    for reason in reasons:
        if not force:
            raise CheckpointError(
                f"{reason}; make the recipe agree with these weights, or set stage2.from to "
                "weights of this backbone, or start a new run with run=...; --force continues "
                "despite the difference"
            )
        if world.first:
            log.warning("--force: %s; continuing nevertheless", reason)


def _differences(run: RunConfig, origin: Path, prepared: bool) -> list[str]:
    backbone, model = run.run / "backbone", weights_of(origin)
    was = None if model.resolve() == backbone.resolve() else lineage.load(model)
    if prepared:
        foreign = was is None and model.resolve() != backbone.resolve()
        return _differences_of_files(run, model) if foreign else []
    now, before, reasons = backbone_now(run), lineage.load(backbone), list[str]()
    place, known = f"model.backbone={run.model.backbone}", before.backbone if before else None
    if now and known and (changed := known.differences(now)) and _has_trained(run):
        reasons.append(
            f"{place} has changed since this run was trained from it ({', '.join(changed)})"
        )
    if was is None:
        return reasons
    for key in ("count", "separator"):
        trained, asked = getattr(was.bottleneck, key), getattr(run.bottleneck, key)
        if trained != asked:
            reasons.append(
                f"{origin} was trained with bottleneck.{key}={trained} and the recipe says {asked}"
            )
    if now and was.backbone and not reasons and not _descends(was, now, run, model):
        changed = was.backbone.differences(now)
        reasons.append(
            f"{origin} was trained from another backbone than {place} ({', '.join(changed)})"
        )
    return reasons


def _descends(was: Lineage, now: Backbone, run: RunConfig, model: Path) -> bool:
    """Return whether the weights come from the recipe's backbone, or are that backbone."""
    if was.descends_from(now):
        return True
    itself = identify(run.model.model_copy(update={"backbone": str(model)}))
    return itself is not None and not itself.differences(now)


def _differences_of_files(run: RunConfig, model: Path) -> list[str]:
    """Compare tokenizer and config of weights without lineage with the prepared backbone's.

    A file that the weights lack is not compared.
    """
    log.info("%s has no %s: its earlier training data is not known", model, lineage.NAME)
    backbone, trust = run.run / "backbone", run.model.trust_remote_code
    contents: dict[str, Callable[[Path], Any]]
    contents = {"tokenizer": lineage.tokenizer_hash, "config": partial(_config, trust=trust)}
    differing = [
        name
        for name, content in contents.items()
        if (model / f"{name}.json").is_file() and content(model) != content(backbone)
    ]
    if not differing:
        return []
    return [f"{model} has another {' and another '.join(differing)} than {backbone}"]


def _config(folder: Path, *, trust: bool) -> Any:
    """Return what in config.json changes hidden states, in this transformers' own names."""
    plain = AutoConfig.from_pretrained(folder, trust_remote_code=trust).to_dict()
    return {
        k: v for k, v in plain.items() if k not in _IRRELEVANT_KEYS and not k.endswith("_token_id")
    }


def _has_trained(run: RunConfig) -> bool:
    return any(saved(run.run / f"stage{number}") for number in (1, 2))


def begin(run: RunConfig, number: int, split: str, origin: Path, *, resumed: bool) -> Dataset:
    """Write the stage's lineage and training texts to RUN/stageN. Rank 0 calls it.

    Args:
        run: The recipe.
        number: 1 or 2.
        split: The split of the data that the stage trains on.
        origin: The checkpoint or folder of weights that the stage starts from.
        resumed: Whether `origin` is a checkpoint of this stage.

    Returns:
        The data.

    Raises:
        DataError: The training texts belong to other data.
    """
    folder, parents = run.run / f"stage{number}", [weights_of(origin), run.run / "backbone"]
    folder.mkdir(parents=True, exist_ok=True)
    known = [before for parent in parents if (before := lineage.load(parent))]
    data = Dataset.of(run.data.folder)
    earlier = [texts for parent in parents for texts in trained_texts.load(parent)]
    # A run that resumes has the texts of its data in its checkpoint, which may be a gigabyte.
    resumes = any(texts.fingerprint == data.fingerprint for texts in earlier)
    texts = [] if resumes else trained_texts.of_data(run.data.folder)
    if not resumes and not texts:
        log.warning(
            "data.folder=%s has no %s, so eval cannot tell which texts this model has seen; run "
            "`lbr-ds prepare` again",
            data.place,
            trained_texts.NAME,
        )
    elif texts and texts[0].fingerprint != data.fingerprint:
        raise DataError(
            f"{data.place}/{trained_texts.NAME} belongs to data {texts[0].fingerprint}, but the "
            f"manifest to {data.fingerprint}; {trained_texts.CURE}"
        )
    trained_texts.save([*earlier, *texts], folder)
    dimensions = tuple(sorted(run.stage2.matryoshka, reverse=True)) if number == 2 else ()
    training = Training(
        stage=number,
        split=split,
        steps=0,
        samples=0,
        data=data,
        dimensions=dimensions,
        replayed="".join(STAGES[part].split for part in run.parts(number)[1:]),
    )
    bottleneck = lineage.Bottleneck.of(run.model, run.bottleneck)
    start = lineage.unite(known) if known else Lineage(backbones=(), bottleneck=bottleneck)
    start = start.model_copy(update={"bottleneck": bottleneck})
    start.trained(training, resumed=resumed).save(folder)
    return data


def data_of(stage_folder: Path) -> Dataset:
    """Return the data of the stage, as `begin` wrote it down."""
    started = lineage.load(stage_folder)
    assert started is not None
    return started.history[-1].data


def describe(stage_folder: Path, step: int, samples: int, model: Path) -> list[Path]:
    """Write the stage's lineage, after `step` steps, and its training texts into a model folder.

    Returns:
        The files written.
    """
    started = lineage.load(stage_folder)
    assert started is not None
    *past, training = started.history
    training = training.model_copy(update={"steps": step, "samples": samples})
    started.model_copy(update={"history": (*past, training)}).save(model)
    texts = [trained_texts.NAME] if (stage_folder / trained_texts.NAME).is_file() else []
    return [model / lineage.NAME, *link_files(texts, stage_folder, model)]
