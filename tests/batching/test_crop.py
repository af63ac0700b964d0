"""Two spans of one passage: where they end, how long they are, and what decides them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lbr_ds.batching.contrastive import hashed
from lbr_ds.batching.crop import crop
from lbr_ds.config import RunConfig, load
from lbr_ds.config.training import CropConfig
from lbr_ds.corpora.curate.segmentation import units
from lbr_ds.corpora.prepare import prepare
from lbr_ds.distributed import World
from lbr_ds.errors import DataError
from lbr_ds.model.bottleneck import prepare_backbone
from lbr_ds.objectives.false_negatives import FalseNegatives
from lbr_ds.records import Record
from lbr_ds.shards import read_split
from lbr_ds.training.feed import open_feed
from lbr_ds.training.session import text_tokenizer
from lbr_ds.training.stages import STAGES
from lbr_ds.training.work import Work
from tests.tiny import tiny_recipe

ENGLISH = "Signs of (acute) leukemia include fever, fatigue; bruising: easily, and night sweats."
# As words or letters with their marks, separated by | where no space separates them.
UNITS = {
    "english": "A |fever, |is |(very) |heat.",
    "korean": "\ub098\ub294 |\ud559\uad50\uc5d0 |\uac04\ub2e4.",
    "chinese": "\u7cd6|\u5c3f|\u75c5|(CT|\u68c0|\u67e5)\u3002|\u300c\u9ad8|\u538b\u300d|\u662f",
    "japanese": "\u304b\u3099|\u305c|\u3092|\u5f15|\u3044|\u305f|\u3089\u3001|\u30c9|\u30af",
    "thai": "\u0e01\u0e34|\u0e19|\u0e02\u0e49\u0e32|\u0e27 |\u0e40\u0e1e\u0e37\u0e48|\u0e2d|\u0e02",
    "khmer": "\u179f\u17d2\u178f\u17d2\u179a\u17b8",
    "mixed": "mix |\u9ad8|\u8840|\u5727 |of |both",
    "signs": "...",
}
PINNED = (
    "include fever,",
    ["of (acute) leukemia include fever, fatigue; bruising: easily, and night"],
)
BOUNDS = ((0.1, 0.5), (0.3, 1.0))


def passage(text: str = ENGLISH, name: str = "p1", group: str = "") -> Record:
    return Record(name, "s", text=text, group=group)


@pytest.mark.parametrize("marked", UNITS.values(), ids=UNITS)
def test_units_are_words_and_letters_with_their_marks(marked: str) -> None:
    parts = [part.strip() for part in marked.split("|")]
    text = marked.replace("|", "")
    assert [text[a:b] for a, b in units(text)] == parts


@pytest.mark.parametrize("marked", UNITS.values(), ids=UNITS)
def test_spans_are_of_the_text_and_within_the_bounds(marked: str) -> None:
    text = " ".join([marked.replace("|", "")] * 5)
    places = units(text)
    begins, ends = {a for a, _ in places}, {b for _, b in places}
    seen: set[int] = set()
    for epoch in range(60):
        made = crop(passage(text), *BOUNDS, seed=3, epoch=epoch)
        assert (made.id, made.group, made.text) == ("p1", "", "")
        for span, (low, high) in zip((made.query, *made.positives), BOUNDS, strict=True):
            # A text that repeats itself has the span at several places.
            found = [
                (m.start(), m.start() + len(span))
                for m in re.finditer(f"(?={re.escape(span)})", text)
            ]
            cut = next((a, b) for a, b in found if a in begins and b in ends)
            words = sum(cut[0] <= a < cut[1] for a, _ in places)
            assert max(1, round(low * len(places))) <= words <= max(1, round(high * len(places)))
            seen.add(words)
    assert len(seen) > min(3, len(places) - 2)


def test_the_draw_is_pinned_and_depends_on_epoch_seed_and_id() -> None:
    """A changed draw would change the samples of runs that are resumed."""
    made = crop(passage(), *BOUNDS, seed=0, epoch=0)
    assert (made.query, made.positives) == PINNED
    assert crop(passage(), *BOUNDS, seed=0, epoch=0) == made
    others = [
        crop(passage(), *BOUNDS, seed=0, epoch=1),
        crop(passage(), *BOUNDS, seed=1, epoch=0),
        crop(passage(name="p2"), *BOUNDS, seed=0, epoch=0),
    ]
    assert len({(r.query, *r.positives) for r in [made, *others]}) == 4


def test_a_pair_stays_as_it_is_and_one_word_is_its_own_pair() -> None:
    pair = Record("1", "s", query="q", positives=["a"], negatives=["b"])
    assert crop(pair, *BOUNDS, seed=0, epoch=0) is pair
    alone = crop(passage("Fever."), *BOUNDS, seed=0, epoch=0)
    assert (alone.query, alone.positives) == ("Fever.", ["Fever."])


def test_lengths_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValueError, match=r"query=\[0.5, 0.1\]; give \[shortest, longest\]"):
        CropConfig(query=(0.5, 0.1))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Passages, three of each document, in which stage 2 crops; 24 of them in cl."""
    folder: Path = tmp_path_factory.mktemp("crop")
    recipe = tiny_recipe(folder, prepared=False, stage2__pairs="crop", stage2__num_negatives=0)
    lines = [
        {"id": f"p{i}", "text": f"case {i}: {ENGLISH}", "group": f"document {i // 3}"}
        for i in range(72)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "corpus.jsonl").write_text(text)
    made = load(recipe, ["data.near_duplicate=1", "data.splits={gl: 24, cl: 24, eval: 24}"])
    prepare(made.data, made.seed)
    prepare_backbone(made.model, made.bottleneck, made.run / "backbone", made.seed)
    return made


def feed(run: RunConfig, *, rank: int = 0, size: int = 1, start: int = 0, stop: int) -> list[Work]:
    world = World(rank=rank, size=size)
    source: Any = (run, STAGES[2], text_tokenizer(run), world)
    return list(open_feed(*source, start=start, stop=stop))


def spans(works: list[Work]) -> list[dict[str, int]]:
    """Of each step {record: hash of its positive}."""
    return [
        {name: int(text) for (name, *_), text in zip(w.names, w.pairs.text, strict=True)}
        for w in works
        if w.pairs is not None
    ]


def test_ranks_and_resumes_see_the_spans_of_one_rank_from_the_start(run: RunConfig) -> None:
    alone = spans(feed(run, stop=9))
    ranks = [spans(feed(run, rank=rank, size=2, stop=9)) for rank in (0, 1)]
    assert [one | other for one, other in zip(*ranks, strict=True)] == alone
    assert spans(feed(run, start=4, stop=9)) == alone[4:]
    workers = run.model_copy(update={"data": run.data.model_copy(update={"workers": 2})})
    assert spans(feed(workers, start=4, stop=9)) == alone[4:]
    epochs = [{name: s[name] for s in alone[i : i + 3] for name in s} for i in (0, 3, 6)]
    assert [len(epoch) for epoch in epochs] == [24, 24, 24]
    assert all(len({epoch[name] for epoch in epochs}) == 3 for name in epochs[0])
    records = {r.id: r for r in read_split(run.data.folder, "cl")}
    bounds = run.stage2.crop
    drawn = [
        crop(records[name], bounds.query, bounds.positive, seed=run.seed, epoch=0)
        for name in epochs[0]
    ]
    assert {r.id: hashed(r.positives[0]) for r in drawn} == epochs[0]


def test_spans_of_one_document_are_no_negatives_of_each_other(run: RunConfig) -> None:
    (work,) = feed(run, stop=1)
    assert work.pairs is not None
    groups, texts, real = work.pairs.candidate_labels().T
    mask = FalseNegatives(work.pairs.group, work.pairs.known, groups, texts, real > 0)(slice(0, 8))
    group = {r.id: r.group for r in read_split(run.data.folder, "cl")}
    own = [group[name] for name, *_ in work.names]
    expected = torch.tensor([[one == other for other in own] for one in own])
    assert torch.equal(mask, expected)
    assert 8 < int(mask.sum()) < 64  # some documents are there twice


def test_passages_without_crop_are_refused(run: RunConfig) -> None:
    stage = run.stage2.model_copy(update={"pairs": "given"})
    given = run.model_copy(update={"stage2": stage})
    with pytest.raises(DataError, match=r"not a plain passage; set stage2.pairs=crop, or write"):
        feed(given, stop=1)
