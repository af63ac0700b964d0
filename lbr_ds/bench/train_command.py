"""Row `train_tokens_per_second`: the real `lbr-ds train` on one GPU, on prepared data.

The backbone has the shape of SmolLM2-135M and random weights; its tokenizer is trained on the
texts. Nothing is downloaded. The rate is the one that the run writes to its metrics.jsonl.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from lbr_ds.bench import models
from lbr_ds.bench.measure import Row, Target
from lbr_ds.bench.setting import Setting
from lbr_ds.bench.workload import BOTTLENECK, DEMO, TINY, random_model
from lbr_ds.cluster.benchmark.processes import failure_reason, run_command
from lbr_ds.config import load
from lbr_ds.errors import LbrError
from lbr_ds.plan.shape import known_backbones
from lbr_ds.shards import Manifest, read_split
from lbr_ds.system.atomic import write_json
from lbr_ds.training.meter import METRICS

RECORDS, QUICK_RECORDS = 4000, 200
STEPS, QUICK_STEPS = 60, 4
MEAN_TOKENS = 100  # of a made-up sequence [X ; B ; Y]
MICRO_BATCHES = (65_536, 32_768, 16_384, 8_192)  # tokens: the largest one that fits is taken
QUICK_MICRO_BATCH = 1024
ALPHABET = 256  # bytes, the smallest vocabulary
TOKENIZER_TEXTS = 5000


def measure(target: Target, setting: Setting) -> Row:
    """Prepare data and backbone, train for some steps, and read the steady rate."""
    setting.release()
    shape = {**TINY, "vocab_size": 512} if setting.quick else known_backbones()[DEMO]["config"]
    steps = QUICK_STEPS if setting.quick else STEPS
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        texts = _texts(setting, folder / "corpus.jsonl")
        _write_backbone(shape, texts, folder / "backbone")
        recipe = folder / "recipe.yaml"
        size = _micro_batch(shape, folder, setting)
        write_json(recipe, _recipe(folder, size, steps, setting.data))  # JSON is YAML
        if setting.data is None:
            _verb("prepare", str(recipe), log=folder / "prepare.log")
        began = perf_counter()
        _verb("train", str(recipe), "--stage", "1", "--nproc", "1", log=folder / "train.log")
        wall = perf_counter() - began
        lines = (folder / "run" / "stage1" / METRICS).read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    steady = metrics[len(metrics) // 3 :]
    waits = sum(m["data_wait_seconds"] for m in steady) / sum(m["step_seconds"] for m in steady)
    return target.row(
        [m["tokens_per_second"] for m in steady],
        first_seconds=wall - sum(m["step_seconds"] for m in metrics),
        about=f"`lbr-ds train --stage 1` on one {models.DEVICE}, {shape['num_hidden_layers']} "
        f"layers of {shape['hidden_size']}, random weights, {setting.data or 'made-up texts'}; "
        f"steps {steady[0]['step']} to {steady[-1]['step']} of {METRICS}, at most {size} tokens a "
        f"micro-batch, {waits:.0%} of the time waiting for data; first calls: the command's time "
        "outside of its steps",
    )


def _verb(*words: str, log: Path) -> None:
    """Run `lbr-ds WORDS`. Raises LbrError with the reason if it fails."""
    code = run_command([sys.executable, "-m", "lbr_ds", *words], log)
    if code:
        raise LbrError(f"lbr-ds {words[0]}: {failure_reason(log.read_text(), code)}")


def _recipe(folder: Path, size: int, steps: int, data: Path | None) -> dict[str, Any]:
    optim = {"lr": 1e-4}
    return {
        "name": "bench",
        "run": str(folder / "run"),
        "model": {
            "backbone": str(folder / "backbone"),
            "max_length": 128,
            "activation_checkpointing": False,
        },
        "bottleneck": {"count": BOTTLENECK},
        "data": {
            "folder": str(data.resolve() if data else folder / "data"),
            "sources": [{"path": str(folder / "corpus.jsonl"), "license": "made up"}],
            "splits": {"gl": 0.8, "cl": 0.1, "eval": 0.1},
        },
        "stage1": {
            "num_steps": steps,
            "max_target_length": 128,
            "samples_per_step": max(2, size * 9 // 10 // MEAN_TOKENS),
            "micro_batch_tokens": size,
            "optim": optim,
        },
        "stage2": {"num_steps": 1, "samples_per_step": 2, "temperature": 0.05, "optim": optim},
        "engine": {"ds_config": "auto"},
        "every": {"log": 1, "save": steps, "keep": 1, "evaluate": None},
    }


def _micro_batch(shape: dict[str, Any], folder: Path, setting: Setting) -> int:
    """Return the tokens of a micro-batch: the most that fit into the device by the plan."""
    if setting.quick:
        return QUICK_MICRO_BATCH
    for size in MICRO_BATCHES:
        path = folder / "planned.yaml"
        write_json(path, _recipe(folder, size, STEPS, setting.data))
        if models.planned(load(path), 1, shape) <= models.device_bytes():
            return size
    return MICRO_BATCHES[-1]


def _texts(setting: Setting, corpus: Path) -> list[str]:
    """Return texts to train a tokenizer on; without data, write made-up records to `corpus`."""
    if setting.data is not None:
        Manifest.load(setting.data)
        records = islice(read_split(setting.data, "gl"), TOKENIZER_TEXTS)
        return [text for r in records for text in (getattr(r, "query", ""), *_passages(r)) if text]
    made = list(made_up(QUICK_RECORDS if setting.quick else RECORDS))
    corpus.write_text("".join(json.dumps(record) + "\n" for record in made), encoding="utf-8")
    return [text for record in made for text in (record["query"], record["positives"][0])]


def _passages(record: Any) -> Iterable[str]:
    return getattr(record, "positives", None) or (record.text,)


def made_up(count: int) -> Iterator[dict[str, Any]]:
    """Yield pairs of random words whose lengths spread as those of short questions and answers."""
    draw = random.Random(0)
    syllables = [a + b for a in "bcdfghjklmnprstvz" for b in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(20_000)]
    for number in range(count):
        query = draw.choices(words, k=draw.randint(6, 30))
        answer = draw.choices(words, k=draw.randint(20, 90))
        yield {"id": str(number), "query": " ".join(query), "positives": [" ".join(answer)]}


def _write_backbone(shape: dict[str, Any], texts: list[str], folder: Path) -> None:
    """Write random weights of a shape with a byte-level BPE tokenizer of that vocabulary."""
    bpe = Tokenizer(tokenizer_models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max(ALPHABET + 2, shape["vocab_size"] - BOTTLENECK),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts[:TOKENIZER_TEXTS], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    random_model({**shape, **ids}, dtype=models.DTYPE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
