"""What a model was trained on stays with it, and a stage starts only from what fits its recipe."""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lbr_ds import lineage
from lbr_ds.config import RunConfig, load
from lbr_ds.corpora.curate import trained_texts
from lbr_ds.distributed import World
from lbr_ds.errors import CheckpointError, DataError
from lbr_ds.evaluation import evaluate
from lbr_ds.evaluation.contamination import texts_trained_on
from lbr_ds.exporting import export
from lbr_ds.lineage import Lineage
from lbr_ds.model.bottleneck import bottleneck_ids, prepare_backbone
from lbr_ds.records import Record
from lbr_ds.report import write_report
from lbr_ds.runs import MANIFEST, checkpoints
from lbr_ds.shards import Manifest, read_split, write_split
from lbr_ds.training.checkpoint import provenance
from lbr_ds.training.feed import open_feed
from lbr_ds.training.session import text_tokenizer
from lbr_ds.training.stages import STAGES
from tests.ranks import run_ranks
from tests.shards.server import serve
from tests.tiny import backbone, records, tiny_recipe


def make_data(folder: Path, word: str, count: int = 16, per_shard: int = 16) -> Path:
    """A prepared folder whose texts all have `word` in them."""
    splits = {}
    for number, split in enumerate(("gl", "cl", "eval")):
        made = [
            Record(
                f"{split}{i}",
                word,
                f"{word} {split} {r['query']}",
                [f"{word} {split} {r['positives'][0]}"],
            )
            for i, r in enumerate(records(count, seed=number))
        ]
        splits[split] = write_split(folder, split, made, seed=0, records_per_shard=per_shard)
    source = {"name": f"corpus {word}", "path": "x", "license": f"licence of {word}", "origin": ""}
    Manifest(folder, splits, [source], 0, f"{word:0<16}", "test").save()
    trained_texts.write(folder)
    (folder / "curation.json").write_text(json.dumps({"leaks": {"eval_gl": 0, "eval_cl": 0}}))
    return folder


@dataclass
class Chain:
    """Runs that came one from another. folder: where `run1`, `run2` and the data are."""

    folder: Path
    recipe: Path

    def model(self, run: str, stage: int) -> Path:
        return checkpoints(self.folder / run / f"stage{stage}")[-1] / "model"

    def history(self, model: Path) -> list[tuple[int, str, int]]:
        found = lineage.load(model)
        assert found is not None
        return [(t.stage, t.data.name, t.steps) for t in found.history]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """run1: stage 1 on A, stage 2 on B behind a URL -> an export -> run2 takes it for its
    backbone, run3 for its stage 2, both with C. run4's data D is exchanged while it trains."""
    folder = tmp_path_factory.mktemp("chain")
    recipe = tiny_recipe(
        folder,
        prepared=False,
        stage1__num_steps=1,
        stage2__num_steps=1,
        stage2__num_negatives=0,
        every={"save": 1, "evaluate": None},
        engine={"ds_config": "zero2"},
    )
    for word in ("A", "B", "C", "D", "E"):
        make_data(folder / word, word)
    export = str(folder / "export")
    with serve(folder / "B") as server:

        def step(run: str, stage: int, data: str, *more: str) -> list[Any]:
            place = server.url if data == "B" else folder / data
            return [str(recipe), stage, [f"run={folder / run}", f"data.folder={place}", *more]]

        plan = [
            ["train", *step("run1", 1, "A")],
            ["train", *step("run1", 2, "B")],
            ["export", str(folder / "run1"), export],
            ["train", *step("run2", 1, "C", f"model.backbone={export}")],
            ["train", *step("run3", 2, "C", f"stage2.from={export}")],
            [
                "replace",
                str(folder / "D"),
                str(folder / "E"),
                *step("run4", 1, "D", "stage1.num_steps=2"),
            ],
            ["refuse", str(folder / "line"), *step("run4", 2, "C", "bottleneck.count=3")],
        ]
        (folder / "plan.json").write_text(json.dumps(plan))
        run_ranks("tests.training.chain", 1, str(folder))
    return Chain(folder, recipe)


def test_the_history_grows_from_run_to_run(chain: Chain) -> None:
    first = [(1, "A", 1), (2, "data", 1)]
    assert chain.history(chain.model("run1", 1)) == first[:1]
    assert chain.history(chain.model("run1", 2)) == first
    assert chain.history(chain.folder / "export") == first
    assert chain.history(chain.folder / "run2" / "backbone") == first
    assert chain.history(chain.model("run2", 1)) == [*first, (1, "C", 1)]
    assert chain.history(chain.model("run3", 2)) == [*first, (2, "C", 1)]
    names = {
        run: len(lineage.load(chain.model(run, stage)).backbones)  # type: ignore[union-attr]
        for run, stage in (("run1", 2), ("run2", 1), ("run3", 2))
    }
    assert names == {"run1": 1, "run2": 2, "run3": 1}
    assert lineage.load(chain.folder / "run1" / "stage2") is not None


@pytest.mark.parametrize("place", ["run2", "run3", "export"])
@pytest.mark.parametrize("data", ["A", "B", "C"])
def test_no_text_of_the_history_is_scored(
    chain: Chain, tmp_path: Path, place: str, data: str
) -> None:
    asked = tmp_path / "asked"
    trained = [*read_split(chain.folder / data, "gl"), *read_split(chain.folder / data, "cl")]
    files = write_split(asked, "eval", trained, seed=0, records_per_shard=64)
    Manifest(asked, {"eval": files}, [], 0, "asked", "test").save()
    model = str(chain.folder / place)
    if (place, data) == ("export", "C"):
        assert evaluate(model, data=asked)["tasks"]
        return
    line = rf"trained on texts of asked-eval: 32 of 32 queries.*\(data {data}000"
    with pytest.raises(DataError, match=line):
        evaluate(model, data=asked)


def test_its_held_out_texts_are_scored(chain: Chain) -> None:
    for data in ("A", "B", "C"):
        assert "overlap" not in evaluate(str(chain.folder / "run2"), data=chain.folder / data)


def test_a_dataset_without_hashes_is_named(
    chain: Chain, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = shutil.copytree(chain.folder / "export", tmp_path / "model")
    trained_texts.save(trained_texts.load(model)[:1], model)
    (model / MANIFEST).unlink()
    with caplog.at_level(logging.WARNING, "lbr_ds"):
        assert [t.fingerprint[0] for t in texts_trained_on(str(model))] == ["A"]
    assert "trained on data B000000000000000 (data), whose hashes are not in its" in caplog.text


def test_data_exchanged_during_a_training_changes_no_checkpoint(chain: Chain) -> None:
    """The state, the lineage and the hashes name what the weights have seen."""
    line = (chain.folder / "E.line").read_text()  # of a verb that does ask before it replaces D
    assert line.startswith(f"{chain.folder / 'D'} is in use: a training reads its split 'gl'; wait")
    assert Manifest.load(chain.folder / "D").fingerprint[0] == "E"
    for checkpoint in checkpoints(chain.folder / "run4" / "stage1"):
        (seen,) = trained_texts.load(checkpoint / "model")
        assert seen.fingerprint[0] == "D"
        state = json.loads((checkpoint / "state.json").read_text())
        assert state["data"] == seen.fingerprint
        (training,) = lineage.load(checkpoint / "model").history  # type: ignore[union-attr]
        assert (training.data.fingerprint, training.steps) == (seen.fingerprint, state["step"])


@pytest.mark.parametrize("on_error", ["strict", "skip"])
def test_data_exchanged_during_a_training_ends_it_where_it_cannot_be_read(
    chain: Chain, tmp_path: Path, on_error: str
) -> None:
    """Shards that are open are read on; of the next one it is said what has happened."""
    data = make_data(tmp_path / "data", "F", per_shard=2)
    run = load(
        chain.recipe,
        [
            f"run={chain.folder / 'run1'}",
            f"data.folder={data}",
            f"data.on_error={on_error}",
            "stage1.samples_per_step=2",
            "stage1.num_steps=8",
        ],
    )

    def opened() -> Any:
        options: Any = {"start": 0, "stop": 8, "fingerprint": "F000000000000000"}
        return open_feed(run, STAGES[1], text_tokenizer(run), World(), **options)

    feed = opened()
    assert next(feed).samples == 2
    shutil.rmtree(data)
    make_data(data, "G", per_shard=2)
    line = r"data was prepared again during the training \(data F0+ -> G0+\); a checkpoint of"
    with pytest.raises(DataError, match=line):
        list(feed)
    feed = opened()
    with pytest.raises(DataError, match=r"again during the training \(data F0+ -> G0+\)"):
        next(feed)


def test_data_mined_during_a_training_is_that_of_stage_1(chain: Chain, tmp_path: Path) -> None:
    """Mining changes the fingerprint, but not the split `gl`, of which two records are damaged."""
    data = make_data(tmp_path / "data", "F", per_shard=2)
    manifest = Manifest.load(data)
    damaged = data / manifest.shards("gl")[1].file
    damaged.write_bytes(damaged.read_bytes().replace(b'"query"', b'"qu\xffry"'))
    skipping = [f"data.folder={data}", "data.on_error=skip", "stage1.samples_per_step=4"]
    run = load(chain.recipe, [f"run={chain.folder / 'run1'}", *skipping])

    def opened() -> Any:
        options: Any = {"start": 0, "stop": 4, "fingerprint": manifest.fingerprint}
        return open_feed(run, STAGES[1], text_tokenizer(run), World(), **options)

    expected = [(work.names, work.skipped) for work in opened()]
    assert sum(skipped for _, skipped in expected) == 2
    feed = opened()
    works = [next(feed)]
    replace(manifest, fingerprint=f"mined-{manifest.fingerprint}").save()
    works += feed
    assert [(work.names, work.skipped) for work in works] == expected
    assert [(work.names, work.skipped) for work in opened()] == expected, "mined during the start"


def test_an_export_keeps_what_its_bottleneck_rows_have_learnt(chain: Chain) -> None:
    before = load_file(chain.folder / "export" / "model.safetensors")
    after = load_file(chain.folder / "run2" / "backbone" / "model.safetensors")
    ids = bottleneck_ids(chain.folder / "export")
    assert ids == bottleneck_ids(chain.folder / "run2" / "backbone")
    for name, tensor in before.items():
        assert torch.equal(tensor, after[f"model.{name}"]), name


def test_the_card_names_data_and_licences_from_anywhere(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the recipe's data folder is relative, and is not there."""

    def data_section(card: Path) -> str:
        return card.read_text().partition("## Data")[2].partition("## Recipe")[0]

    run = tmp_path / "run"
    model = shutil.copytree(chain.model("run1", 2), run / "stage2/checkpoints/step-000001/model")
    recipe = (chain.folder / "run1" / "recipe.yaml").read_text()
    found = re.search(r"folder: (http\S+)", recipe)
    assert found is not None
    (run / "recipe.yaml").write_text(recipe.replace(found[1], "data"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    export(model, tmp_path / "export")
    card = data_section(tmp_path / "export" / "README.md")
    for part in ("corpus A: licence of A", "corpus B: licence of B", "| gl | 16 |"):
        assert part in card
    assert card == data_section(chain.folder / "export" / "README.md")


def test_the_report_says_what_it_was_trained_on(chain: Chain, tmp_path: Path) -> None:
    (run,) = write_report([chain.folder / "run2"], tmp_path)["runs"]
    assert [row["fingerprint"][0] for row in run["trained_on"]] == ["A", "B", "C"]
    text = (tmp_path / "report.md").read_text()
    assert "| 2 | data | B000000000000000 | cl | 16 | 1 |" in text
    assert "B000000000000000" in (tmp_path / "report.html").read_text()


def opened(chain: Chain, *overrides: str) -> RunConfig:
    return load(chain.recipe, [f"run={chain.folder / 'run1'}", *overrides])


def check(run: RunConfig, origin: Path, *, force: bool = False) -> None:
    """What a start does before and after it prepares the backbone."""
    for prepared in (False, True):
        provenance.check_origin(run, origin, World(), prepared=prepared, force=force)


def other(chain: Chain, tmp_path: Path, part: str) -> Path:
    """The chain's backbone with another config, tokenizer or weights."""
    folder = shutil.copytree(chain.folder / "backbone", tmp_path / "other")
    if part == "weights":
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][0] += 1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        path = folder / ("tokenizer.json" if part == "tokenizer" else "config.json")
        content = json.loads(path.read_text())
        if part == "tokenizer":
            content["added_tokens"][0]["lstrip"] = True
        else:
            content["rms_norm_eps"] = 1e-3
        path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("part", ["config", "tokenizer", "weights"])
def test_stage_2_refuses_a_stage_1_from_another_backbone(
    chain: Chain, tmp_path: Path, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    origin = checkpoints(chain.folder / "run1" / "stage1")[-1]
    check(opened(chain), origin)
    changed = other(chain, tmp_path, part)
    run = load(chain.recipe, [f"run={tmp_path}", f"model.backbone={changed}"])
    line = rf"from another backbone than model.backbone=.*other \({part}: .{{8}} -> .{{8}}\)"
    with pytest.raises(CheckpointError, match=line):
        check(run, origin)
    with caplog.at_level(logging.WARNING, "lbr_ds"):
        check(run, origin, force=True)
    assert "--force: " in caplog.text


def test_a_start_that_is_refused_changes_nothing(chain: Chain) -> None:
    line = (chain.folder / "line").read_text()
    assert "run4/stage1/checkpoints/step-000002 was trained with bottleneck.count=2 and" in line
    run = chain.folder / "run4"
    assert load(run / "recipe.yaml").bottleneck.count == 2
    assert len(bottleneck_ids(run / "backbone")) == 2
    assert checkpoints(run / "stage2") == []


def test_stage_2_refuses_a_stage_1_with_another_bottleneck(chain: Chain) -> None:
    origin = checkpoints(chain.folder / "run1" / "stage1")[-1]
    with pytest.raises(CheckpointError, match=r"with bottleneck\.count=2 and the recipe says 3"):
        check(opened(chain, "bottleneck.count=3"), origin)
    check(opened(chain, "model.pooling=mean", "model.max_length=24"), origin)  # its own reading


def test_weights_without_lineage_are_compared_by_their_files(chain: Chain, tmp_path: Path) -> None:
    run = opened(chain)
    bare = shutil.copytree(chain.model("run1", 1), tmp_path / "bare")
    (bare / lineage.NAME).unlink()
    check(run, bare)
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"bare has another config than .*run1/backbone"):
        check(run, bare)
    prepare_backbone(
        load(chain.recipe, ["bottleneck.count=3"]).model,
        load(chain.recipe, ["bottleneck.count=3"]).bottleneck,
        tmp_path / "three",
        0,
    )
    shutil.copy(tmp_path / "three" / "tokenizer.json", bare)
    with pytest.raises(CheckpointError, match="another tokenizer and another config"):
        check(run, bare)


def test_new_weights_at_the_same_path(
    chain: Chain, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Prepared anew where nothing is trained; refused where something is."""
    place = shutil.copytree(chain.folder / "backbone", tmp_path / "place")
    run = load(chain.recipe, [f"run={tmp_path / 'run'}", f"model.backbone={place}"])
    folder = run.run / "backbone"
    prepare_backbone(run.model, run.bottleneck, folder, run.seed)
    first = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(place)
    other(chain, tmp_path, "weights").rename(place)
    check(run, folder)
    with caplog.at_level(logging.INFO, "lbr_ds"):
        prepare_backbone(run.model, run.bottleneck, folder, run.seed)
    assert f"model.backbone={place} has changed since (weights: " in caplog.text
    second = (folder / "model.safetensors").read_bytes()
    assert first != second
    (run.run / "stage1" / "checkpoints" / "step-000001").mkdir(parents=True)
    backbone(tmp_path / "third", hidden_size=64)
    shutil.rmtree(place)
    (tmp_path / "third").rename(place)
    with pytest.raises(CheckpointError, match=r"since this run was trained from it \(config"):
        check(run, folder)
    check(run, folder, force=True)
    assert (folder / "model.safetensors").read_bytes() == second


def test_a_backbone_that_was_moved_is_the_same(chain: Chain, tmp_path: Path) -> None:
    moved = shutil.copytree(chain.folder / "backbone", tmp_path / "moved")
    run = opened(chain, f"model.backbone={moved}")
    origin = checkpoints(run.run / "stage1")[-1]
    check(run, origin)
    assert provenance.same_backbone(run, origin)
    before = (run.run / "backbone" / "model.safetensors").stat()
    prepare_backbone(run.model, run.bottleneck, run.run / "backbone", run.seed)
    assert (run.run / "backbone" / "model.safetensors").stat() == before
    gone = opened(chain, f"model.backbone={chain.folder / 'backbone'}")
    (chain.folder / "backbone").rename(tmp_path / "away")
    try:  # what was prepared is enough
        check(gone, origin)
        prepare_backbone(gone.model, gone.bottleneck, gone.run / "backbone", gone.seed)
    finally:
        (tmp_path / "away").rename(chain.folder / "backbone")
    assert (run.run / "backbone" / "model.safetensors").stat() == before


def test_two_lineages_unite(chain: Chain) -> None:
    one, two = (lineage.load(chain.model(run, n)) for run, n in (("run2", 1), ("run4", 1)))
    assert one is not None
    assert two is not None
    both = lineage.unite([one, two])
    assert both.history == (*one.history, *two.history)
    assert both.backbones == one.backbones  # the other's is the first of them
    assert lineage.unite([both, one]) == both


def test_a_damaged_lineage_is_named(tmp_path: Path) -> None:
    (tmp_path / lineage.NAME).write_text('{"version": 1}')
    with pytest.raises(
        CheckpointError, match=r"lineage\.json: not a valid lineage.json \(missing key backb"
    ):
        lineage.load(tmp_path)
    assert lineage.load(tmp_path / "nowhere") is None


def test_resuming_adds_no_second_entry(chain: Chain) -> None:
    found = lineage.load(chain.model("run1", 2))
    assert isinstance(found, Lineage)
    last = found.history[-1].model_copy(update={"steps": 9})
    assert found.trained(last, resumed=True).history == (*found.history[:-1], last)
    assert found.trained(last).history == (*found.history, last)


@pytest.mark.parametrize(("stage", "entries"), [(1, 1), (2, 2)])
def test_mined_data_are_other_data_for_stage_2_only(chain: Chain, stage: int, entries: int) -> None:
    """Stage 1 does not read negatives, so its resume after `mine` continues the same entry."""
    found = lineage.load(chain.model("run1", stage))
    assert found is not None
    first = found.model_copy(update={"history": found.history[-1:]})
    data = first.history[-1].data
    mined = data.model_copy(update={"fingerprint": f"mined-{data.fingerprint}"})
    last = first.history[-1].model_copy(update={"steps": 9, "data": mined})
    history = first.trained(last, resumed=True).history
    assert history == (*first.history, last)[-entries:]
