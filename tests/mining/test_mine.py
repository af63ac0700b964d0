"""The whole way on a small prepared folder: what is written, what stays, what a kill costs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lbr_ds.batching import TextTokenizer
from lbr_ds.batching.contrastive import contrastive_pairs, hashed
from lbr_ds.config import BottleneckConfig, ModelConfig, RunConfig
from lbr_ds.corpora.curate.segmentation import key
from lbr_ds.corpora.prepare import prepare
from lbr_ds.distributed import World
from lbr_ds.errors import CheckpointError, ConfigError, DataError
from lbr_ds.instructions import Instructed
from lbr_ds.mining import mine as mining
from lbr_ds.mining import rewrite, vectors
from lbr_ds.mining.mine import mine
from lbr_ds.model.bottleneck import load_tokenizer, prepare_backbone
from lbr_ds.shards import Manifest, read_split, steps, verify, writer
from lbr_ds.system import blocks
from tests.mining.toy import Words, file_bytes, make_run, with_mining
from tests.tiny import backbone

DENSE: dict[str, Any] = {
    "methods": ("bm25", "dense"),
    "model": "words",
    "guide": "second",
    "keep": 3,
}


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    return make_run(tmp_path / "toy")


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    """use(first, second): the models that names stand for."""
    monkeypatch.setattr(blocks, "ROWS", 16)

    def install(*models: Words) -> None:
        by_name = {m.name: m for m in models}
        monkeypatch.setattr(mining, "Encoder", lambda name, **options: by_name[name])

    return install


def test_negatives_are_other_groups_passages_of_cl(run: RunConfig) -> None:
    folder = run.data.folder
    before = list(read_split(folder, "cl"))
    eval_texts = {key(t) for r in read_split(folder, "eval") for t in r.texts()}
    audit = mine(run)
    after = list(read_split(folder, "cl"))
    answers = {key(t): r.group for r in after for t in r.positives}
    pool = {key(t) for r in before for t in (*r.positives, *r.negatives)}
    mined = 0
    for old, new in zip(before, after, strict=True):
        assert new.negatives[: len(old.negatives)] == old.negatives
        assert (old.id, old.query, old.positives) == (new.id, new.query, new.positives)
        assert len(set(map(key, new.negatives))) == len(new.negatives)
        for text in new.negatives[len(old.negatives) :]:
            mined += 1
            assert key(text) in pool - eval_texts
            assert answers.get(key(text)) != new.group
    assert mined == audit["kept"] > len(before)
    assert audit["candidates_seen"] == audit["kept"] + sum(audit["dropped"].values())
    assert len(audit["examples"]) == 10


def test_only_cl_changes_and_the_manifest_tells(run: RunConfig) -> None:
    folder = run.data.folder
    before, old = file_bytes(folder), Manifest.load(folder)
    audit = mine(run)
    after, new = file_bytes(folder), verify(folder)
    for name, content in before.items():
        if name.startswith(("gl/", "eval/")) or name == "curation.json":
            assert after[name] == content
        if name.startswith("cl/"):
            assert after[name.replace("cl/", "given/")] == content
    assert new.fingerprint == f"{audit['fingerprint']}-{old.fingerprint}"
    assert new.prepared == old.fingerprint
    assert new.sources[:-1] == old.sources
    assert new.sources[-1]["path"] == "mining.json"
    assert json.loads((folder / "mining.json").read_text()) | {"reused": False} == audit
    assert sorted(p.name for p in folder.parent.iterdir()) == ["data", "data.mining", "raw.jsonl"]


def test_twice_the_same_bytes(tmp_path: Path, use: Any) -> None:
    made = []
    for name in ("one", "two"):
        use(Words("words"), Words("second"))
        run = make_run(tmp_path / name, **DENSE, pick="random")
        mine(run)
        made.append(file_bytes(run.data.folder))
    first, second = made
    for content in (first, second):  # each names the place of its raw file
        content.pop("manifest.json"), content.pop("curation.json")
        content.pop("mining.json"), content.pop("trained.u64")
    assert first == second


@pytest.mark.slow
def test_shards_written_by_other_processes_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name, alone in (("one", writer._RECORDS_ALONE), ("many", 0)):
        monkeypatch.setattr(writer, "_RECORDS_ALONE", alone)
        run = make_run(tmp_path / name)
        mine(run)
        assert len(Manifest.load(run.data.folder).shards("cl")) > 2
        found.append(file_bytes(run.data.local_folder / "cl"))
    assert found[0] == found[1]


def test_mined_again_from_what_was_given(run: RunConfig) -> None:
    folder = run.data.folder
    before = list(read_split(folder, "cl"))
    mine(run)
    content = file_bytes(folder)
    assert mine(run)["reused"]
    assert file_bytes(folder) == content
    other = with_mining(run, keep=1)
    assert not mine(other)["reused"]
    for old, new in zip(before, read_split(folder, "cl"), strict=True):
        assert len(new.negatives) <= len(old.negatives) + 1
    mine(run)
    assert file_bytes(folder) == content


def test_another_near_duplicate_share_is_mined_again(tmp_path: Path) -> None:
    """The rules `same_as_positive` and `same_as_kept` use it; the oracle is a first run with it."""

    def mined(name: str, *shares: float) -> tuple[list[bool], list[tuple[str, ...]]]:
        run = make_run(tmp_path / name)
        reused = []
        for share in shares:
            data = run.data.model_copy(update={"near_duplicate": share})
            audit = mine(run.model_copy(update={"data": data}))
            assert audit is not None
            reused.append(audit["reused"])
        return reused, [record.negatives for record in read_split(run.data.folder, "cl")]

    (_, first), (_, other) = mined("first", 0.7), mined("other", 0.1)
    assert first != other
    assert mined("both", 0.7, 0.1, 0.1) == ([False, False, True], other)


def test_prepare_leaves_mined_data_alone(run: RunConfig) -> None:
    mine(run)
    content = file_bytes(run.data.folder)
    assert prepare(run.data, run.seed)["reused"]
    assert file_bytes(run.data.folder) == content


@pytest.mark.parametrize("stop_after", [0, 1, 4, 9])
def test_killed_and_resumed_is_uninterrupted(run: RunConfig, use: Any, stop_after: int) -> None:
    run = with_mining(run, **DENSE)
    folder, whole = run.data.folder, Words("words")
    copied = folder.parent / "copy"
    shutil.copytree(folder.parent, copied)
    use(whole, Words("second"))
    mine(run)
    expected = file_bytes(folder)

    shutil.rmtree(folder.parent / "data.mining")
    shutil.rmtree(folder)
    shutil.copytree(copied / "data", folder)
    killed = Words("words", stop_after=stop_after)
    use(killed, Words("second"))
    untouched = file_bytes(folder)
    with pytest.raises(KeyboardInterrupt):
        mine(run)
    assert file_bytes(folder) == untouched
    again = Words("words")
    use(again, Words("second"))
    mine(run)
    assert file_bytes(folder) == expected
    assert again.texts == whole.texts - killed.texts


def test_other_texts_or_models_never_meet_old_vectors(run: RunConfig, use: Any) -> None:
    run = with_mining(run, methods=("dense",), model="words")
    first = Words("words")
    use(first)
    mine(run)
    kept = {p.name for p in (run.data.folder.parent / "data.mining").iterdir()}
    assert len(kept) == 4  # texts, two sets of vectors and the rankings
    same = Words("words")
    use(same)
    mine(with_mining(run, keep=2))
    assert same.texts == 0
    mine(with_mining(run, methods=("bm25",)))
    assert {p.name for p in (run.data.folder.parent / "data.mining").iterdir()} == kept
    changed = Words("words")
    changed.fingerprint = "trained on"
    use(changed)
    mine(run)
    assert changed.texts == first.texts
    now = {p.name for p in (run.data.folder.parent / "data.mining").iterdir()}
    assert len(now) == 4
    (texts,) = now & kept
    assert (run.data.folder.parent / "data.mining" / texts / "passages.utf8").is_file()


def test_a_damaged_block_is_made_again(tmp_path: Path, use: Any) -> None:
    use()
    texts, encoder = [f"text {i}" for i in range(40)], Words()
    vectors.embed(texts, encoder, "query", tmp_path)
    (block, *_) = sorted(tmp_path.rglob("*.npy"))
    block.write_bytes(block.read_bytes()[:-9])
    again = Words()
    found = vectors.embed(texts, again, "query", tmp_path)
    assert again.texts == 16
    assert (found.rows(np.arange(40)) == encoder.encode(texts, "query")).all()


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_vector_that_is_not_finite_is_one_line(tmp_path: Path, use: Any, number: float) -> None:
    """The line names the model, the place of the text and the text; earlier blocks are kept."""

    class Overflows(Words):
        def encode(self, texts: list[str], role: str) -> Any:
            rows = super().encode(texts, role)
            rows[[text.endswith("text 20") for text in texts], 3] = number
            return rows

    use()
    texts, encoder = [Instructed("find: ", f"text {i}") for i in range(40)], Overflows()
    message = r"^words: the vector of query 21 \('text 20'\) is not finite .*use another model$"
    with pytest.raises(CheckpointError, match=message):
        vectors.embed(texts, encoder, "query", tmp_path)
    (first,) = tmp_path.rglob("*.npy")
    assert first.name == "00000.npy"
    with pytest.raises(CheckpointError, match=message):
        vectors.embed_share(texts, encoder, "query", tmp_path, World(rank=1, size=2))


def test_a_fault_while_writing_leaves_the_folder(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file_bytes(run.data.folder)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rewrite, "verify", full)
    with pytest.raises(Exception, match="data: no space is left on the disk"):
        mine(run)
    assert file_bytes(run.data.folder) == before
    assert sorted(p.name for p in run.data.folder.parent.iterdir()) == [
        "data",
        "data.mining",
        "raw.jsonl",
    ]


def test_mined_negatives_reach_the_step(run: RunConfig, tmp_path: Path) -> None:
    mine(run)
    model = ModelConfig(backbone=str(backbone(tmp_path / "raw")), max_length=32)
    prepare_backbone(model, BottleneckConfig(count=2), tmp_path / "backbone", 0)
    encoder = TextTokenizer(load_tokenizer(tmp_path / "backbone"), max_length=32, num_bottleneck=2)
    (step,) = steps(run.data.folder, "cl", seed=0, samples_per_step=8, rank=0, world=1, stop=1)
    records = [sample.record for sample in step.samples]
    pairs = contrastive_pairs(records, [0] * len(records), encoder, 2)
    negatives = {hashed(text) for record in records for text in record.negatives}
    assert pairs.real.all()
    assert set(pairs.text[len(records) :].tolist()) <= negatives


def test_gl_may_lend_passages(run: RunConfig) -> None:
    alone = mine(run)["passages"]
    both = mine(with_mining(run, passages=("cl", "gl")))
    assert both["passages"] > alone
    verify(run.data.folder)


def test_what_is_wrong_is_one_line(run: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder; give a folder, a run"):
        mine(with_mining(run, methods=("dense",), model=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="holds no model"):
        mine(with_mining(run, guide=str(tmp_path)))
    with pytest.raises(ValueError, match="methods has dense and model is empty"):
        with_mining(run, methods=("dense",))
    with pytest.raises(ValueError, match="give \\[first, last\\]"):
        with_mining(run, ranks=(5, 4))
    shutil.rmtree(run.data.folder)
    with pytest.raises(DataError, match="run `lbr-ds prepare`"):
        mine(run)


def test_shards_of_one_source_stay_so(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    raw = tmp_path / "raw.jsonl"
    rows = [json.loads(line) for line in raw.read_text().splitlines()]
    named = [{**row, "source": "own" if n % 3 else "toy"} for n, row in enumerate(rows)]
    raw.write_text("".join(json.dumps(row) + "\n" for row in named))
    prepare(run.data, run.seed, by_source=True)
    manifest = Manifest.load(run.data.folder)
    before = [record.id for record in read_split(run.data.folder, "cl")]
    mine(run)
    mined = Manifest.load(run.data.folder)
    facts = [[(s.source, s.records) for s in m.shards("cl")] for m in (manifest, mined)]
    assert len({source for source, _ in facts[0]}) == 2
    assert facts[0] == facts[1]
    assert [record.id for record in read_split(run.data.folder, "cl")] == before
