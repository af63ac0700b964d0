"""Instructions: the same text goes before a query or a document in every part."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lbr_ds.batching import TextEncoder, pack
from lbr_ds.batching.contrastive import contrastive_pairs
from lbr_ds.batching.generative import generative_sequence
from lbr_ds.config import RunConfig, load
from lbr_ds.corpora import overlap
from lbr_ds.corpora.prepare import prepare
from lbr_ds.errors import ConfigError, DataError
from lbr_ds.instructions import Instructed, Instructions, Used, bare, instruction_of
from lbr_ds.model.bottleneck import load_tokenizer, prepare_backbone
from lbr_ds.model.encoder import PackedEncoder
from lbr_ds.records import Record
from lbr_ds.shards import Manifest, read_split
from lbr_ds.train.feed import open_feed
from lbr_ds.train.loop import text_encoder
from lbr_ds.train.stages import STAGES
from tests.tiny import records, tiny_recipe

QUERY, DOCUMENT = "Find the case: ", "Case: "
HOW = {"query": "q", "positives": "a", "instruction": "how"}
BOTH = {"query": QUERY, "document": DOCUMENT}


def source(folder: Path, name: str, lines: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A source of the recipe, written to `folder`."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"path": str(path), "name": name, **more}


def named(count: int, name: str) -> list[dict[str, Any]]:
    """Records that leave their source to the recipe, no two alike between two names."""
    made = records(count, seed=hash(name) % 1000)
    return [
        {
            "query": f"{r['query']} {name}",
            "positives": [f"{r['positives'][0]} {name}"],
            "negatives": r["negatives"],
        }
        for r in made
    ]


def recipe(folder: Path, sources: list[dict[str, Any]], **changes: Any) -> RunConfig:
    """A tiny run over `sources`, prepared, with its backbone."""
    changes = {"data__splits": {"gl": 0.4, "cl": 0.4, "eval": 0.2}, **changes}
    run = load(tiny_recipe(folder, prepared=False, data__sources=sources, **changes))
    prepare(run.data, run.seed, model=run.model, bottleneck=run.bottleneck.count)
    prepare_backbone(run.model, run.bottleneck, run.run / "backbone", run.seed)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """One source with instructions on both sides, read at the last bottleneck token."""
    folder = tmp_path_factory.mktemp("both")
    return recipe(folder, [source(folder, "cases", named(60, "cases"), instruction=BOTH)])


def test_an_instructed_text_is_the_string_that_a_tokenizer_gets() -> None:
    text = Instructed("Find: ", "a cure", "record r1 of s")
    assert text == "Find: a cure"
    assert (instruction_of(text), bare(text)) == ("Find: ", "a cure")
    again = pickle.loads(pickle.dumps(text))  # held-out texts travel between ranks
    assert (again, again.instruction, again.where) == (text, "Find: ", "record r1 of s")
    assert (instruction_of("plain"), bare("plain")) == ("", "plain")


def test_a_source_gives_and_a_record_overrides(tmp_path: Path) -> None:
    lines = named(30, "own")
    lines[0] |= {"instruction": "Else: "}
    lines[1] |= {"instruction": "", "document_instruction": "Doc: "}
    text = source(tmp_path, "texts", [{"text": f"a plain passage {n}"} for n in range(9)],
                  instruction={"query": "Q: ", "document": "P: "})  # fmt: skip
    table = source(tmp_path, "table", [
        {"q": f"asked {n}", "a": f"told {n}", "how": "H: " if n == 0 else ""} for n in range(9)
    ], columns=HOW, instruction="T: ")  # fmt: skip
    run = recipe(tmp_path, [source(tmp_path, "own", lines, instruction=BOTH), text, table])
    found = [r for name in ("gl", "cl", "eval") for r in read_split(run.data.folder, name)]
    by_id = {r.id: (r.instruction, r.document_instruction) for r in found}
    own = [pair for i, pair in by_id.items() if i.startswith("own")]
    assert sorted(set(own)) == sorted({("Else: ", DOCUMENT), ("", "Doc: "), (QUERY, DOCUMENT)})
    assert own.count((QUERY, DOCUMENT)) == 28
    assert {by_id[i] for i in by_id if i.startswith("texts")} == {("", "P: ")}
    told = sorted(pair for i, pair in by_id.items() if i.startswith("table"))
    assert told == [("H: ", "")] + [("T: ", "")] * 8
    used = Manifest.load(run.data.folder).instructions
    assert sum(sum(row.records.values()) for row in used.rows) == len(found)
    assert used.distinct("query")[0] == QUERY
    assert used.more == 0
    curation = json.loads((Path(run.data.folder) / "curation.json").read_text())
    assert curation["instructions"] == used.plain()
    assert Instructions.of(used.plain()) == used


def test_leaks_and_duplicates_are_found_on_the_bare_text(tmp_path: Path) -> None:
    """The same pairs under two instructions are duplicates, and hashes are of texts alone."""
    lines = named(30, "same")
    sources = [source(tmp_path, n, lines, instruction=f"{n}: ") for n in ("one", "two")]
    run = recipe(tmp_path, sources)
    made = json.loads((Path(run.data.folder) / "curation.json").read_text())
    assert made["dropped_records"]["duplicate"]["count"] == 30
    trained = overlap.load(Path(run.data.folder))
    assert trained is not None
    record = next(iter(read_split(run.data.folder, "cl")))
    assert trained.holds([record.query, record.positives[0]]).all()
    assert not trained.holds([record.asked()]).any()


def test_batches_have_the_template_on_both_sides(run: RunConfig) -> None:
    encoder = text_encoder(run)
    record = Record("r", "s", query="a fever", positives=["a cure"], negatives=["no cure"],
                    instruction=QUERY, document_instruction=DOCUMENT)  # fmt: skip
    pairs = contrastive_pairs([record], [0], encoder, 2)
    texts = [QUERY + "a fever", *(DOCUMENT + t for t in ("a cure", "no cure", "a cure"))]
    assert [s.context for s in pairs.sequences] == encoder.contexts(texts)
    plain = Record("r", "s", query="a fever", positives=["a cure"], negatives=["no cure"])
    bare_pairs = contrastive_pairs([plain], [0], encoder, 2)
    assert torch.equal(pairs.text, bare_pairs.text)
    assert torch.equal(pairs.known, bare_pairs.known)
    for objective, x in {"sft": QUERY + "a fever", "uncut": QUERY + "a fever",
                         "reconstruct": DOCUMENT + "a cure"}.items():  # fmt: skip
        made = generative_sequence(record, objective, encoder, turn=0, max_target_length=9)
        assert made.context == encoder.contexts([x])[0]
        assert made.target == encoder.target("a cure", 9)
    prefix = generative_sequence(record, "continue", encoder, turn=0, max_target_length=9)
    ids = encoder.plain("a cure", 99)
    half = len(ids) // 2
    assert prefix.context == encoder.wrap(encoder.plain(DOCUMENT, 99) + ids[:half])
    assert prefix.target[:-1] == ids[half:]


def mean_run(folder: Path, count: int, pool_instruction: bool) -> RunConfig:
    """Mean pooling, with instructions on both sides."""
    sources = [source(folder, "cases", named(40, "cases"), instruction=BOTH)]
    return recipe(
        folder, sources, model__pooling="mean", model__pool_instruction=pool_instruction,
        bottleneck__count=count, stage1__objective="gl",
    )  # fmt: skip


@pytest.mark.parametrize("count", [0, 1])
def test_mean_pooling_leaves_out_the_instruction(count: int, tmp_path: Path) -> None:
    """Against the mean of the text's own states, taken by hand from plain transformers."""
    run = mean_run(tmp_path, count, False)
    model = PackedEncoder(run.run / "backbone", dtype=torch.float32)
    text = Instructed(QUERY, "what is a fever of the liver")
    ids = torch.tensor(model.texts.contexts([text]))
    size = len(model.texts.plain(QUERY, 99))
    with torch.inference_mode():
        states = model.model.states(pack(model.texts.embed([text])))[-1]
    assert ids.shape[1] == len(states)
    expected = torch.nn.functional.normalize(states[size:].mean(0), dim=0)
    others = [Instructed(DOCUMENT, "a cure"), "a text without one"]
    found = model.encode([others[0], text, others[1]])
    assert np.abs(found[1] - expected.numpy()).max() <= 1e-6
    including = torch.nn.functional.normalize(states.mean(0), dim=0)
    assert np.abs(found[1] - including.numpy()).max() > 1e-3
    assert np.abs(model.encode([str(text)])[0] - including.numpy()).max() <= 1e-6


def test_what_an_export_would_get_wrong_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pool_instruction=false with bottleneck.count=2.* 0 or"):
        load(tiny_recipe(tmp_path, prepared=False, model__pooling="mean",
                         model__pool_instruction=False))  # fmt: skip
    bad = {"data__sources": [{"path": "x", "instruction": {"query": "Q: {query}"}}]}
    with pytest.raises(ConfigError, match=r"before the text as it is; leave out \{query\}"):
        load(tiny_recipe(tmp_path, prepared=False, **bad))


LONG = "find the case of this very long and winding instruction that leaves no room at all "


def test_an_instruction_without_room_is_refused_at_prepare(tmp_path: Path) -> None:
    sources = [source(tmp_path, "cases", named(30, "cases"), instruction=LONG * 2)]
    with pytest.raises(DataError, match=r"sources cases, instruction.query: its instruction 'find"):
        recipe(tmp_path, sources)
    lines = named(30, "cases")
    lines[3]["document_instruction"] = LONG * 2
    with pytest.raises(DataError, match=r"source cases, document side: its .*model.max_length to"):
        recipe(tmp_path, [source(tmp_path, "cases", lines)])
    lines[3]["document_instruction"] = ""
    recipe(tmp_path, [source(tmp_path, "cases", lines, instruction="Find: ")])


def test_an_instruction_without_room_is_refused_before_training(tmp_path: Path) -> None:
    """Prepared where no tokenizer was at hand, or for a longer max_length."""
    sources = [source(tmp_path, "cases", named(40, "cases"), instruction=LONG)]
    run = recipe(tmp_path, sources, model__max_length=200)
    short = run.model_copy(update={"model": run.model.model_copy(update={"max_length": 24})})
    encoder = text_encoder(short)
    with pytest.raises(DataError, match=r"source cases, query side: its .*=24 for the text"):
        open_feed(short, STAGES[2], encoder, rank=0, world=1, start=0, stop=1)
    record = next(iter(read_split(run.data.folder, "cl")))
    with pytest.raises(DataError, match=rf"record {record.id} of cases: its instruction"):
        encoder.embed([record.asked()])
    needed = int(str(_error(encoder, record)).rpartition(" ")[2])
    assert _error(_like(encoder, needed), record) is None
    assert _error(_like(encoder, needed - 1), record) is not None


def _like(encoder: TextEncoder, max_length: int) -> TextEncoder:
    return TextEncoder(encoder.tokenizer, max_length=max_length,
                       num_bottleneck=encoder.num_bottleneck)  # fmt: skip


def _error(encoder: TextEncoder, record: Record) -> DataError | None:
    try:
        encoder.contexts([record.asked()])
    except DataError as error:
        return error
    return None


def test_an_instruction_is_tokenised_once(run: RunConfig) -> None:
    encoder, seen = text_encoder(run), []
    tokenizer = encoder.tokenizer

    class Counting:
        def __call__(self, text: Any, **options: Any) -> Any:
            seen.append(text)
            return tokenizer(text, **options)

    encoder.tokenizer = Counting()  # type: ignore[assignment]
    encoder.embed([Instructed(QUERY, f"text {n}") for n in range(50)])
    assert [t for t in seen if isinstance(t, str)] == [QUERY]


def test_one_instruction_is_the_default_and_several_are_named() -> None:
    one = Instructions((Used("a", "Q: ", "D: ", {"cl": 3}), Used("b", None, "D: ", {"gl": 2})))
    assert one.prompts() == {"query": "Q: ", "document": "D: "}
    assert one.unsettled() == []
    rows = (
        Used("a", "Q: ", "D: ", {"cl": 3}),
        Used("a", "R: ", "D: ", {"cl": 2}),
        Used("b", "Q: ", "", {"gl": 2}),
    )
    several = Instructions(rows)
    assert several.unsettled() == ["query", "document"]
    assert several.prompts() == {
        "query": "", "document": "", "query-a": "Q: ", "query-a-2": "R: ", "query-b": "Q: ",
        "document-a": "D: ",
    }  # fmt: skip
    assert several.of_source("b", "model").prompts() == {"query": "Q: ", "document": ""}
    assert several.within("gl").prompts() == {"query": "Q: ", "document": ""}
    with pytest.raises(DataError, match="model: no instructions of a source 'c'; it has a, b"):
        several.of_source("c", "model")
    assert Instructions(rows[:1], more=7).unsettled() == ["query", "document"]
    assert not Instructions((Used("a", "", "", {"cl": 1}),)).any


def test_a_tokenizer_of_the_prepared_backbone_counts_alike(run: RunConfig) -> None:
    """`prepare` counts with the untouched tokenizer, training with the prepared one."""
    from lbr_ds.corpora.tokens import room

    encoder = TextEncoder(load_tokenizer(run.run / "backbone"), max_length=20, num_bottleneck=2)
    model = run.model.model_copy(update={"max_length": 20})
    space = room(model, 2, "")
    assert space is not None
    for words in range(1, 15):
        text = Instructed("fever " * words, "", "w")
        errors = []
        for check in (encoder.check, space.check):
            try:
                check([text])
                errors.append("")
            except DataError as error:
                errors.append(str(error))
        assert errors[0] == errors[1]
    assert errors[0]
