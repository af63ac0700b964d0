"""The public encoder: the vectors of the trainer's code, of `eval` and of sentence-transformers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from lbr_ds.config import RunConfig, load
from lbr_ds.encoder import Encoder
from lbr_ds.errors import CheckpointError
from lbr_ds.evaluation import held_out_tasks, load_model
from lbr_ds.evaluation.scoring import recorded
from lbr_ds.exporting import export
from lbr_ds.instructions import Instructed, bare
from lbr_ds.model.bottleneck import prepare_backbone
from lbr_ds.model.packed_encoder import PackedEncoder
from lbr_ds.shards import Manifest
from tests.tiny import tiny_recipe

TEXTS = ["acute pain", "a cyst of the liver and of the kidney", "fever"]
INSTRUCTION = {"query": "find: ", "document": "text: "}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run with a backbone alone, trained with instructions, and ../export, made from it."""
    folder = tmp_path_factory.mktemp("encoder")
    source = {"path": str(folder / "corpus.jsonl"), "name": "made-up", "instruction": INSTRUCTION}
    run = load(tiny_recipe(folder, data__sources=[source]))
    backbone = run.run / "backbone"
    prepare_backbone(run.model, run.bottleneck, backbone, 0)
    Manifest.load(run.data.folder).instructions.save(backbone)
    (backbone / "files.json").unlink()
    export(backbone, folder / "export")
    return run


def vectors_of_eval(model: str, data: Path) -> dict[str, dict[str, np.ndarray]]:
    """{"query" or "document": {text without instruction: vector}} that `eval` searches with."""
    (task,) = held_out_tasks(data)
    encoder: Any = load_model(model)
    with recorded(encoder, task) as seen:
        options: Any = {"batch_size": 64, "show_progress_bar": False}
        mteb.evaluate(encoder, task, cache=None, co2_tracker=False, encode_kwargs=options)
    texts = {"query": task.judged.queries, "document": task.judged.documents}
    return {side: {bare(texts[side][i]): v for i, v in seen[side].items()} for side in texts}


@pytest.mark.parametrize("kind", ["run", "export"])
def test_the_vectors_are_those_of_eval(run: RunConfig, kind: str) -> None:
    """Bit for bit: both encode in the same batches."""
    model = str(run.run if kind == "run" else run.run.parent / "export")
    seen = vectors_of_eval(model, run.data.local_folder)
    encoder = Encoder(model)
    for side, encode in (("query", encoder.encode_queries), ("document", encoder.encode_documents)):
        vectors = encode(list(seen[side]))
        assert (vectors.dtype, vectors.shape) == (np.float32, (len(seen[side]), 32))
        assert np.array_equal(vectors, np.stack(list(seen[side].values())))
        assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6


@pytest.mark.parametrize("kind", ["run", "export", "other"])
def test_one_text_gives_one_vector(run: RunConfig, tmp_path: Path, kind: str) -> None:
    """A plain str is one text, not a sequence of letters, as in sentence-transformers."""
    place = run.run if kind == "run" else run.run.parent / "export"
    if kind == "other":  # without lbr.json an export is a model of others
        place = Path(shutil.copytree(place, tmp_path / "model"))
        (place / "lbr.json").unlink()
        theirs = SentenceTransformer(str(place)).encode_query("fever")
        assert theirs.shape == (32,)
    encoder = Encoder(place)
    for encode in (encoder.encode_queries, encoder.encode_documents):
        for instruction in (None, "other: "):
            vector = encode("fever", instruction)
            assert vector.shape == (32,)
            assert np.array_equal(vector, encode(["fever"], instruction)[0])
    for text in ("fever", Instructed("find: ", "fever")):
        vector = encoder.encode(text, "query")
        assert np.array_equal(vector, encoder.encode([text], "query")[0])
    assert encoder.encode_queries("").shape == (32,)


def test_an_export_has_the_vectors_of_its_run(run: RunConfig) -> None:
    ours, exported = Encoder(run.run), Encoder(run.run.parent / "export")
    for instruction in (None, "", "other: "):
        first, second = (e.encode_queries(TEXTS, instruction) for e in (ours, exported))
        assert np.abs(first - second).max() <= 1e-5
        wanted = INSTRUCTION["query"] if instruction is None else instruction
        plain = PackedEncoder(run.run / "backbone").encode([Instructed(wanted, t) for t in TEXTS])
        assert np.array_equal(first, plain)


def test_a_model_of_others_is_used_with_its_own_prompts(run: RunConfig, tmp_path: Path) -> None:
    """An export without lbr.json is a sentence-transformers model like any other."""
    shutil.copytree(run.run.parent / "export", tmp_path / "model")
    (tmp_path / "model" / "lbr.json").unlink()
    encoder, theirs = Encoder(tmp_path / "model"), SentenceTransformer(str(tmp_path / "model"))
    assert not encoder.ours
    unit: Any = {"normalize_embeddings": True}
    queries, documents = theirs.encode_query(TEXTS, **unit), theirs.encode_document(TEXTS, **unit)
    other = theirs.encode(TEXTS, prompt="other: ", **unit)
    assert np.array_equal(encoder.encode_queries(TEXTS), queries)
    assert np.array_equal(encoder.encode_documents(TEXTS), documents)
    assert np.array_equal(encoder.encode_queries(TEXTS, "other: "), other)
    assert Encoder("owner/name").folder is None  # nothing is loaded yet


def test_batches_device_and_type_are_settings(run: RunConfig) -> None:
    whole = Encoder(run.run).encode_documents(TEXTS)
    parts = Encoder(run.run, batch_tokens=16, device="cpu").encode_documents(TEXTS)
    assert np.abs(whole - parts).max() < 1e-6
    for place in (run.run, run.run.parent / "export"):
        half = Encoder(place, dtype=torch.bfloat16).encode_documents(TEXTS)
        assert half.dtype == np.float32
        assert 0 < np.abs(whole - half).max() < 0.05
        assert Encoder(place).encode_queries([]).shape == (0, 32)


def test_a_changed_file_changes_the_fingerprint(run: RunConfig, tmp_path: Path) -> None:
    shutil.copytree(run.run.parent / "export", tmp_path / "model")
    before = Encoder(run.run.parent / "export").fingerprint
    assert Encoder(tmp_path / "model").fingerprint == before
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(CheckpointError, match=r"config.json: \d+ bytes, \d+ were saved\); .*yours"):
        Encoder(tmp_path / "model")
    config.with_name("files.json").unlink()
    assert Encoder(tmp_path / "model").fingerprint != before


def test_a_folder_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(
        CheckpointError, match=r"its files cannot be loaded .*save the model again$"
    ):
        Encoder(tmp_path).encode_queries(["a"])
