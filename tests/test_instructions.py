"""Instructions: the same text goes before a query or a document in every part."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import zlib
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
import torch
from datasets import Dataset
from mteb.models import SentenceTransformerEncoderWrapper
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader

from lbr_ds.batching import TextTokenizer, pack
from lbr_ds.batching.contrastive import contrastive_pairs
from lbr_ds.batching.generative import generative_sequence
from lbr_ds.config import RunConfig, load
from lbr_ds.corpora.curate import trained_texts
from lbr_ds.corpora.prepare import prepare
from lbr_ds.distributed import World
from lbr_ds.encoder import Encoder
from lbr_ds.errors import ConfigError, DataError
from lbr_ds.evaluation import held_out_tasks, load_model, official_tasks
from lbr_ds.evaluation.scoring import recorded
from lbr_ds.exporting import export
from lbr_ds.instructions import Instructed, Instructions, Used, bare, instruction_of
from lbr_ds.model.bottleneck import load_tokenizer, prepare_backbone
from lbr_ds.model.packed_encoder import PackedEncoder
from lbr_ds.records import Record
from lbr_ds.runs import model_folder
from lbr_ds.shards import Manifest, read_split
from lbr_ds.training.feed import open_feed
from lbr_ds.training.session import text_tokenizer
from lbr_ds.training.stages import STAGES
from tests.ranks import run_cli
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
    made = records(count, seed=zlib.crc32(name.encode()))
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
    text = source(
        tmp_path,
        "texts",
        [{"text": f"a plain passage {n}"} for n in range(9)],
        instruction={"query": "Q: ", "document": "P: "},
    )
    table = source(
        tmp_path,
        "table",
        [{"q": f"asked {n}", "a": f"told {n}", "how": "H: " if n == 0 else ""} for n in range(9)],
        columns=HOW,
        instruction="T: ",
    )
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
    (trained,) = trained_texts.load(Path(run.data.folder))
    record = next(iter(read_split(run.data.folder, "cl")))
    assert trained.holds([record.query, record.positives[0]]).all()
    assert not trained.holds([record.instructed_query()]).any()


def test_batches_have_the_template_on_both_sides(run: RunConfig) -> None:
    encoder = text_tokenizer(run)
    record = Record(
        "r",
        "s",
        query="a fever",
        positives=["a cure"],
        negatives=["no cure"],
        instruction=QUERY,
        document_instruction=DOCUMENT,
    )
    pairs = contrastive_pairs([record], [0], encoder, 2)
    texts = [QUERY + "a fever", *(DOCUMENT + t for t in ("a cure", "no cure", "a cure"))]
    assert [s.context for s in pairs.sequences] == encoder.contexts(texts)
    plain = Record("r", "s", query="a fever", positives=["a cure"], negatives=["no cure"])
    bare_pairs = contrastive_pairs([plain], [0], encoder, 2)
    assert torch.equal(pairs.text, bare_pairs.text)
    assert torch.equal(pairs.known, bare_pairs.known)
    for objective, x in {
        "ib_sft": QUERY + "a fever",
        "ib_uncut": QUERY + "a fever",
        "ib_reconstruct": DOCUMENT + "a cure",
    }.items():
        made = generative_sequence(record, objective, encoder, turn=0, max_target_length=9)
        assert made.context == encoder.contexts([x])[0]
        assert made.target == encoder.target("a cure", 9)
    prefix = generative_sequence(record, "ib_continue", encoder, turn=0, max_target_length=9)
    ids = encoder.plain("a cure", 99)
    half = len(ids) // 2
    assert prefix.context == encoder.wrap(encoder.plain(DOCUMENT, 99) + ids[:half])
    assert prefix.target[:-1] == ids[half:]


@pytest.fixture(scope="module")
def mean(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The same data, read at the mean of the texts without their instructions."""
    folder = tmp_path_factory.mktemp("mean")
    sources = [source(folder, "cases", named(40, "cases"), instruction=BOTH)]
    return recipe(
        folder,
        sources,
        model__pooling="mean",
        model__pool_instruction=False,
        bottleneck__count=0,
        stage1__objective="plain_sft",
    )


def test_mean_pooling_leaves_out_the_instruction(mean: RunConfig) -> None:
    """Against the mean of the text's own states."""
    model = PackedEncoder(mean.run / "backbone", dtype=torch.float32)
    text = Instructed(QUERY, "what is a fever of the liver")
    ids = torch.tensor(model.tokenizer.contexts([text]))
    size = len(model.tokenizer.plain(QUERY, 99))
    with torch.inference_mode():
        states = model.model.states(pack(model.tokenizer.embed([text])))[-1]
    assert ids.shape[1] == len(states)
    expected = torch.nn.functional.normalize(states[size:].mean(0), dim=0)
    others = [Instructed(DOCUMENT, "a cure"), "a text without one"]
    found = model.encode([others[0], text, others[1]])
    assert np.abs(found[1] - expected.numpy()).max() <= 1e-6
    including = torch.nn.functional.normalize(states.mean(0), dim=0)
    assert np.abs(found[1] - including.numpy()).max() > 1e-3
    assert np.abs(model.encode([str(text)])[0] - including.numpy()).max() <= 1e-6


def test_what_an_export_would_get_wrong_is_refused(tmp_path: Path) -> None:
    for count in (1, 2):
        off = {"model__pooling": "mean", "model__pool_instruction": False}
        with pytest.raises(ConfigError, match=r"pool_instruction=false with .*; set .*count to 0"):
            load(tiny_recipe(tmp_path, prepared=False, bottleneck__count=count, **off))
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
    encoder = text_tokenizer(short)
    with pytest.raises(DataError, match=r"source cases, query side: its .*=24 for the text"):
        open_feed(short, STAGES[2], encoder, World(), start=0, stop=1)
    record = next(iter(read_split(run.data.folder, "cl")))
    with pytest.raises(DataError, match=rf"record {record.id} of cases: its instruction"):
        encoder.embed([record.instructed_query()])
    needed = int(str(_error(encoder, record)).rpartition(" ")[2])
    assert _error(_like(encoder, needed), record) is None
    assert _error(_like(encoder, needed - 1), record) is not None


def _like(encoder: TextTokenizer, max_length: int) -> TextTokenizer:
    return TextTokenizer(
        encoder.backend, max_length=max_length, num_bottleneck=encoder.num_bottleneck
    )


def _error(encoder: TextTokenizer, record: Record) -> DataError | None:
    try:
        encoder.contexts([record.instructed_query()])
    except DataError as error:
        return error
    return None


def test_an_instruction_is_tokenised_once(run: RunConfig) -> None:
    encoder, seen = text_tokenizer(run), []
    tokenizer = encoder.backend

    class Counting:
        def __call__(self, text: Any, **options: Any) -> Any:
            seen.append(text)
            return tokenizer(text, **options)

    encoder.backend = Counting()  # type: ignore[assignment]
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
        "query": "",
        "document": "",
        "query-a": "Q: ",
        "query-a-2": "R: ",
        "query-b": "Q: ",
        "document-a": "D: ",
    }
    assert several.of_source("b", "model").prompts() == {"query": "Q: ", "document": ""}
    assert several.within("gl").prompts() == {"query": "Q: ", "document": ""}
    with pytest.raises(ConfigError, match=r"-of c: model was not .* choose one of: a, b"):
        several.of_source("c", "model")
    assert Instructions(rows[:1], more=7).unsettled() == ["query", "document"]
    assert not Instructions((Used("a", "", "", {"cl": 1}),)).any


def test_a_tokenizer_of_the_prepared_backbone_counts_alike(run: RunConfig) -> None:
    """`prepare` counts with the untouched tokenizer, training with the prepared one."""
    from lbr_ds.corpora.token_counts import room

    encoder = TextTokenizer(load_tokenizer(run.run / "backbone"), max_length=20, num_bottleneck=2)
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


def vectors_of_batches(folder: Path, found: list[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Queries and positives of stage-2 batches, as the trainer packs and encodes them."""
    model = PackedEncoder(folder, dtype=torch.float32)
    pairs = contrastive_pairs(found, [0] * len(found), model.tokenizer, 0)
    with torch.inference_mode():
        vectors = model.model(pack(pairs.sequences)).numpy()
    return vectors[: len(found)], vectors[len(found) :]


def by_mteb(model: Any, texts: list[str], side: str) -> np.ndarray:
    """What an official task of mteb would get."""
    inputs: Any = DataLoader(Dataset.from_dict({"text": texts}), batch_size=5)
    return np.asarray(
        model.encode(
            inputs,
            task_metadata=official_tasks(["NFCorpus"])[0].metadata,
            hf_split="test",
            hf_subset="default",
            prompt_type=PromptType(side),
            show_progress_bar=False,
        )
    )


def weights(run: RunConfig, split: str = "cl") -> Path:
    """The backbone as a model that a stage has left, with the instructions of its split."""
    folder = run.run / f"as-{split}"
    if not folder.exists():
        shutil.copytree(run.run / "backbone", folder)
        Manifest.load(run.data.folder).instructions.within(split).save(folder)
    return folder


@pytest.mark.parametrize("name", ["run", "mean"])
def test_one_vector_everywhere(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Training's batches, eval, sentence-transformers and mteb, queries and documents."""
    run: RunConfig = request.getfixturevalue(name)
    found = list(read_split(run.data.folder, "eval"))[:9]
    model, out = weights(run), tmp_path / "model"
    parity = export(model, out)
    assert set(parity["by_batch_size"]) >= {"query", "document"}
    general = json.loads((out / "config_sentence_transformers.json").read_text())
    assert (general["prompts"], general["default_prompt_name"]) == (BOTH, None)
    pooling = json.loads((out / "1_Pooling" / "config.json").read_text())
    assert pooling["include_prompt"] is (name == "run")

    queries, passages = [r.query for r in found], [r.positives[0] for r in found]
    expected = vectors_of_batches(model, found)
    stock = SentenceTransformer(str(out))
    own, exported = load_model(str(model)), load_model(str(out))
    (task,) = held_out_tasks(run.data.folder)
    for side, texts, wanted, use in (
        ("query", queries, expected[0], stock.encode_query),
        ("document", passages, expected[1], stock.encode_document),
    ):
        got = {
            "sentence-transformers": use(texts),
            "mteb, our encoder": by_mteb(own, texts, side),
            "mteb, export": by_mteb(exported, texts, side),
            "mteb, plain": by_mteb(SentenceTransformerEncoderWrapper(stock), texts, side),
            "mining": Encoder(str(model)).encode(
                [
                    r.instructed_query()
                    if side == "query"
                    else r.instructed_passage(r.positives[0])
                    for r in found
                ],
                side,
            ),
        }
        for place, encoder in (("run", own), ("export", exported)):
            with recorded(encoder, task) as seen:
                mteb.evaluate(encoder, task, cache=None, co2_tracker=False, show_progress_bar=False)
            known = {
                bare(t): seen[side][i]
                for i, t in (
                    task.judged.queries if side == "query" else task.judged.documents
                ).items()
            }
            got[f"eval, {place}"] = np.stack([known[t] for t in texts])
        apart = {part: float(np.abs(vectors - wanted).max()) for part, vectors in got.items()}
        assert max(apart.values()) <= 1e-5, apart
        assert np.abs(stock.encode(texts) - wanted).max() > 1e-3


def test_several_instructions_are_listed_and_none_is_the_default(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sources = [
        source(tmp_path, n, named(40, n), instruction={"query": f"{n}: ", "document": "D: "})
        for n in ("one", "two")
    ]
    run = recipe(tmp_path, sources)
    with caplog.at_level(logging.WARNING, "lbr_ds"):
        export(weights(run), tmp_path / "model")
    (line,) = [r.getMessage() for r in caplog.records if "encode_query uses none" in r.getMessage()]
    assert "query-one" in line
    assert "query-two" in line
    general = json.loads((tmp_path / "model" / "config_sentence_transformers.json").read_text())
    assert general["prompts"] == {
        "query": "",
        "document": "D: ",
        "query-one": "one: ",
        "query-two": "two: ",
    }
    card = (tmp_path / "model" / "README.md").read_text()
    for part in ('| `query-two` | `"two: "` |', 'prompt_name="NAME"', "| `query` | none |"):
        assert part in card
    texts = ["a fever", "a stone"]
    stock = SentenceTransformer(str(tmp_path / "model"))
    model = PackedEncoder(weights(run), dtype=torch.float32)
    wanted = model.encode([Instructed("two: ", t) for t in texts])
    assert np.abs(stock.encode_query(texts, prompt_name="query-two") - wanted).max() <= 1e-5
    for folder in (weights(run), tmp_path / "model"):
        chosen = load_model(str(folder), instructions_of="two")
        assert np.abs(by_mteb(chosen, texts, "query") - wanted).max() <= 1e-5
        free: Any = load_model(str(folder))
        assert np.abs(by_mteb(free, texts, "query") - model.encode(texts)).max() <= 1e-5
        caplog.clear()
        with caplog.at_level(logging.WARNING, "lbr_ds"):
            free.warn_of_several_instructions()
        assert "2 instructions for the query side" in caplog.text
        with pytest.raises(ConfigError, match=r"three: .*; choose one of: one, two"):
            load_model(str(folder), instructions_of="three")


def test_a_checkpoint_carries_the_instructions_of_its_data(tmp_path: Path) -> None:
    sources = [source(tmp_path, "cases", named(40, "cases"), instruction=BOTH)]
    more = {"stage2__from": "backbone", "stage2__num_steps": 1, "stage2__samples_per_step": 4}
    run = recipe(tmp_path, sources, **more)
    done = run_cli("train", str(tmp_path / "recipe.yaml"), "--stage", "2", "--nproc", "1")
    assert done.returncode == 0, done.stderr
    found = Instructions.load(model_folder(run.run))
    assert found == Manifest.load(run.data.folder).instructions.within("cl")
    assert found.prompts() == BOTH
