"""What a teacher says, written into cl and beside it: by a real cross-encoder and by vectors."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from torch.distributed import HashStore
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from lbr_ds.batching import TextTokenizer
from lbr_ds.config import BottleneckConfig, ModelConfig, RunConfig
from lbr_ds.distributed import World
from lbr_ds.errors import CheckpointError, ConfigError, DataError, short
from lbr_ds.mining import teach as room
from lbr_ds.mining.mine import mine
from lbr_ds.mining.teach import teach
from lbr_ds.mining.teachers import Embedder
from lbr_ds.model.bottleneck import load_tokenizer, prepare_backbone
from lbr_ds.records import Record
from lbr_ds.shards import Manifest, read_split, steps, verify
from lbr_ds.shards.teacher import FILES, TeacherVectors, text_key
from lbr_ds.system import blocks
from lbr_ds.training.work import collate_contrastive
from tests.mining.toy import Words, file_bytes, make_run, with_mining
from tests.ranks import run_cli
from tests.tiny import backbone, tiny_recipe


def cross_encoder(folder: Path, labels: int = 1) -> Path:
    """A random-weight classifier of pairs of texts."""
    tokenizer = AutoTokenizer.from_pretrained(backbone(folder / "words"))
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=labels,
        initializer_range=0.5,
    )
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.model_max_length = 128
    BertForSequenceClassification(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cross_encoder(tmp_path_factory.mktemp("reranker"))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Mined by words, with blocks of 16 texts."""
    monkeypatch.setattr(blocks, "ROWS", 16)
    made = make_run(tmp_path / "toy", count=90)
    mine(made)
    return made


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Any:
    """use(model): the embedder that is loaded for every name."""

    def install(model: Any) -> None:
        monkeypatch.setattr(room, "scorer", lambda name, **options: Embedder(model))
        monkeypatch.setattr(room, "Encoder", lambda name, **options: model)

    return install


def cl(run: RunConfig) -> list[Record]:
    return list(read_split(run.data.folder, "cl"))


def bare(record: Record) -> Record:
    return replace(record, positive_scores=[], negative_scores=[])


def test_a_cross_encoder_writes_its_logits(run: RunConfig, reranker: Path) -> None:
    before = cl(run)
    audit = teach(with_mining(run, score_with=str(reranker)))
    assert audit is not None
    after = cl(run)
    assert [bare(record) for record in after] == before
    tokenizer = AutoTokenizer.from_pretrained(reranker)
    model = AutoModelForSequenceClassification.from_pretrained(reranker)
    margins, above = [], 0
    for record in after:
        wanted = []
        for text in (*record.positives, *record.negatives):
            with torch.no_grad():
                wanted.append(
                    float(model(**tokenizer(record.query, text, return_tensors="pt")).logits)
                )
        found = record.positive_scores + record.negative_scores
        assert found == pytest.approx(wanted, abs=2e-5)
        own = [min(record.positive_scores) - score for score in record.negative_scores]
        margins += own
        above += any(margin < 0 for margin in own)
    scores = audit["scores"]
    assert len({round(margin, 4) for margin in margins}) > 20
    assert scores["kind"] == "cross-encoder"
    assert scores["negatives"] == len(margins)
    assert scores["negatives_above_the_positive"] == sum(margin < 0 for margin in margins) > 0
    assert scores["queries_with_a_negative_above"] == above
    assert scores["margins"]["p50"] == pytest.approx(float(np.median(margins)), abs=1e-4)
    assert (scores["queries"], scores["positives"]) == (len(after), len(after))
    verify(run.data.folder)


def test_an_embedder_writes_cosines_and_vectors(run: RunConfig, use: Any) -> None:
    words = Words()
    use(words)
    both = with_mining(run, score_with="words", teacher_vectors="words")
    audit = teach(both)
    assert audit is not None
    manifest = Manifest.load(run.data.folder)
    teacher = TeacherVectors(manifest)
    teacher.check()
    for record in cl(run):
        texts = [*record.positives, *record.negatives]
        found = teacher.of([record.query], texts).astype(np.float32)
        wanted = words.encode([record.query, *texts], "any")
        np.testing.assert_allclose(found, wanted, atol=1e-3)
        cosines = wanted[1:] @ wanted[0]
        assert record.positive_scores + record.negative_scores == pytest.approx(cosines, abs=1e-5)
    assert np.isnan(teacher.rows([text_key("unheard of", "query"), 0])).all()
    assert teacher.dimension == audit["vectors"]["dimension"] == 24
    # With everything in place nothing is encoded or written again.
    before = file_bytes(run.data.folder)
    again = teach(both)
    assert again is not None
    assert again["reused"] is True
    assert file_bytes(run.data.folder) == before


def taught_again(run: RunConfig, copy: Path, use: Any) -> tuple[dict[str, bytes], int]:
    """The files after the data as they were are taught in one go, and how many texts it encoded."""
    shutil.rmtree(run.data.local_folder)
    shutil.rmtree(run.data.local_folder.with_name("data.mining"))
    shutil.copytree(copy, run.data.local_folder)
    whole = Words()
    use(whole)
    teach(run)
    return file_bytes(run.data.local_folder), whole.texts


@pytest.mark.parametrize("stop_after", [0, 2, 5])
def test_killed_and_resumed_is_uninterrupted(run: RunConfig, use: Any, stop_after: int) -> None:
    both = with_mining(run, score_with="words", teacher_vectors="words")
    copy = run.data.local_folder.with_name("copy")
    shutil.copytree(run.data.folder, copy)
    stopped = Words(stop_after=stop_after)
    use(stopped)
    with pytest.raises(KeyboardInterrupt):
        teach(both)
    assert file_bytes(run.data.local_folder) == file_bytes(copy)
    rest = Words()
    use(rest)
    teach(both)
    resumed = file_bytes(run.data.local_folder)
    assert taught_again(both, copy, use) == (resumed, rest.texts + stopped.texts)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_shares_of_ranks_are_the_whole(run: RunConfig, use: Any, ranks: int) -> None:
    """Rank 0 writes the texts, each rank encodes its share, and nothing is left to encode."""
    both = with_mining(run, score_with="words", teacher_vectors="words")
    copy = run.data.local_folder.with_name("copy")
    shutil.copytree(run.data.folder, copy)
    store, counts = HashStore(), []
    for rank in range(ranks):
        words = Words()
        use(words)
        room._share(both, run.data.local_folder, World(rank, ranks, store=store))
        counts.append(words.texts)
    last = Words()
    use(last)
    teach(both)
    assert last.texts == 0 < min(counts)
    shared = file_bytes(run.data.local_folder)
    assert taught_again(both, copy, use) == (shared, sum(counts))


def test_another_teacher_starts_from_what_was_mined(run: RunConfig, use: Any) -> None:
    mined, fingerprint = cl(run), Manifest.load(run.data.folder).fingerprint
    use(Words())
    teach(with_mining(run, score_with="words", teacher_vectors="words"))
    first = Manifest.load(run.data.folder)
    use(Words("others", width=9))
    teach(with_mining(run, score_with="others"))
    second = Manifest.load(run.data.folder)
    assert len({fingerprint, first.fingerprint, second.fingerprint}) == 3
    assert first.prepared == second.prepared
    assert [bare(record) for record in cl(run)] == mined
    assert set(FILES) <= first.files.keys()
    assert not set(FILES) & second.files.keys()
    assert not (run.data.local_folder / FILES[0]).exists()
    verify(run.data.folder)
    # The same negatives are there, so mining changes nothing; others take the scores with them.
    kept = mine(run)
    assert kept is not None
    assert kept["reused"] is True
    assert Manifest.load(run.data.folder).fingerprint == second.fingerprint
    mine(with_mining(run, keep=1))
    last = Manifest.load(run.data.folder)
    assert not any(record.positive_scores or record.negative_scores for record in cl(run))
    assert "unscored" not in last.splits
    assert not (run.data.local_folder / "teacher.json").exists()
    verify(run.data.folder)


def test_scores_that_records_came_with(tmp_path: Path) -> None:
    """Mined negatives have none, so the negatives of such a record lose theirs."""
    run = make_run(tmp_path / "toy", count=60, pick="top")
    raw = tmp_path / "toy" / "raw.jsonl"
    rows = [json.loads(line) for line in raw.read_text().splitlines()]
    for row in rows:
        row |= {"positive_scores": [2.0], "negative_scores": [1.0] * len(row["negatives"])}
    raw.write_text("".join(json.dumps(row) + "\n" for row in rows))
    from lbr_ds.corpora.prepare import prepare

    prepare(run.data, run.seed)
    given = {record.id: record for record in cl(run)}
    mine(run)
    assert any(record.negative_scores for record in given.values())
    for record in cl(run):
        more = len(record.negatives) > len(given[record.id].negatives)
        assert record.positive_scores == [2.0]
        assert record.negative_scores == ([] if more else given[record.id].negative_scores)


def test_vectors_reach_the_step(run: RunConfig, use: Any, tmp_path: Path) -> None:
    words = Words()
    use(words)
    teach(with_mining(run, teacher_vectors="words"))
    model = ModelConfig(backbone=str(backbone(tmp_path / "backbone")), max_length=32)
    prepare_backbone(model, BottleneckConfig(count=2), tmp_path / "made", 0)
    tokenizer = TextTokenizer(load_tokenizer(tmp_path / "made"), max_length=32, num_bottleneck=2)
    stage = {**run.stage2.model_dump(by_alias=True), "num_negatives": 2}
    stage["distillation"] = {"loss": "batch_kl"}
    run = run.model_copy(update={"stage2": type(run.stage2).model_validate(stage)})
    stream = steps(run.data.folder, "cl", seed=0, samples_per_step=4, rank=0, world=1, stop=1)
    step = next(iter(stream))
    pairs = collate_contrastive(run, tokenizer, step).pairs
    assert pairs is not None
    assert pairs.teacher is not None
    records = [sample.record for sample in step.samples]
    texts = [record.query for record in records] + [record.positives[0] for record in records]
    wanted = words.encode(texts, "any")
    np.testing.assert_allclose(pairs.teacher[:8].float().numpy(), wanted, atol=1e-3)
    known = pairs.teacher.isfinite().all(1)
    assert torch.equal(known[4:], pairs.real)


def test_what_is_wrong_is_one_line(run: RunConfig, use: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no teacher-keys\.npy; run `lbr-ds mine --teacher-v"):
        TeacherVectors(Manifest.load(run.data.folder))
    with pytest.raises(ConfigError, match="gives a pair of texts 2 numbers"):
        teach(with_mining(run, score_with=str(cross_encoder(tmp_path / "two", labels=2))))
    use(Words())
    teach(with_mining(run, teacher_vectors="words"))
    path = run.data.local_folder / FILES[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"teacher-vectors\.npy: altered"):
        TeacherVectors(Manifest.load(run.data.folder)).check()


def test_a_score_that_is_not_finite_is_one_line(
    run: RunConfig, reranker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line names the model, the pair and its texts; the data is unchanged."""
    before = cl(run)
    asked = [(r.query, text) for r in before for text in (*r.positives, *r.negatives)]
    query, passage = asked[20]

    def predict(self: Any, pairs: list[tuple[str, str]], **options: Any) -> Any:
        return np.array([np.nan if pair == asked[20] else 0.5 for pair in pairs])

    monkeypatch.setattr(CrossEncoder, "predict", predict)
    with pytest.raises(CheckpointError) as caught:
        teach(with_mining(run, score_with=str(reranker)))
    line = f"{reranker}: the score of pair 21 ({short(query, 60)!r}, {short(passage, 60)!r}) is"
    assert str(caught.value).startswith(line)
    assert cl(run) == before


@pytest.mark.slow
def test_two_ranks_write_what_one_does(tmp_path: Path, reranker: Path) -> None:
    """On the command line: mined and scored at once, and scored after mining."""
    recipe = tiny_recipe(
        tmp_path,
        count=400,
        data__splits={"gl": 0.1, "cl": 0.8, "eval": 0.1},
        data__near_duplicate=1,
    )
    data, found = tmp_path / "data", []
    shutil.copytree(data, tmp_path / "prepared")
    ways = [["--nproc", "2"], ["--keep-negatives"]]
    for ranks in ("1", "2"):
        words = ["mine", str(recipe), "--score-with", str(reranker)]
        if ranks == "1":
            assert run_cli("mine", str(recipe)).returncode == 0
        done = run_cli(*words, *ways[ranks == "1"])
        assert done.returncode == 0, done.stderr
        assert "cross-encoder" in done.stdout
        assert "score above it" in done.stdout
        work = file_bytes(tmp_path / "data.mining")
        assert sum(name.endswith("00001.npy") for name in work) == 1
        found.append({**work, **file_bytes(data)})
        for folder in (data, tmp_path / "data.mining"):
            shutil.rmtree(folder)
        shutil.copytree(tmp_path / "prepared", data)
    assert found[0] == found[1]
    refused = run_cli("mine", str(recipe), "--keep-negatives")
    assert refused.returncode == ConfigError.exit_code
    assert "there is no teacher" in refused.stderr
