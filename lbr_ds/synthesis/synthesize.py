"""Write queries for plain passages into cl: everything that `lbr-ds synthesize` does.

Memory: the text of the passages, of the written queries and of eval, as for `lbr-ds mine`; five
times that of the passages while BM25 indexes them.

Answers are stored in `DATA.synthesis/`, beside DATA: a killed command resumes there, and other
rules for the same answers ask nothing again. It may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import operator
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import lbr_ds
from lbr_ds.config import CONTROL, RunConfig
from lbr_ds.corpora.curate import leaks
from lbr_ds.corpora.curate.segmentation import key
from lbr_ds.corpora.prepare import SYNTHESIS
from lbr_ds.distributed import ALONE, World, leave
from lbr_ds.encoder import Encoder
from lbr_ds.errors import ConfigError, DataError
from lbr_ds.instructions import Instructions, Used
from lbr_ds.mining.rewrite import SYNTHESIZE, on_ranks, rewrite
from lbr_ds.records import Record
from lbr_ds.shards import Manifest, read_split
from lbr_ds.shards.in_use import refuse_in_use
from lbr_ds.shards.order import WRITE, permutation
from lbr_ds.synthesis import judging
from lbr_ds.synthesis.answers import Answers
from lbr_ds.synthesis.ask import ask
from lbr_ds.synthesis.round_trip import BM25
from lbr_ds.synthesis.rules import Candidate, Refused
from lbr_ds.system.atomic import check_replaceable
from lbr_ds.system.progress import Progress, no_progress

log = logging.getLogger(__name__)
_RULES = 2  # increase it when the same answers and settings would give other pairs
_EXAMPLES, _SHOWN, _CHARS = 10, 3, 600  # in the audit: kept queries, refusals, characters
# Settings that change neither answers nor rules.
_OPERATION = {
    "url",
    "api_key_variable",
    "concurrency",
    "requests_per_minute",
    "retries",
    "timeout",
    "ranker",
}


def synthesize(
    run: RunConfig, progress: Progress = no_progress, world: World = ALONE
) -> dict[str, Any] | None:
    """Replace the plain passages of cl by pairs of a written query and its passage.

    Records of cl with a query stay. The same data, settings, seed and answers give the same bytes.

    Args:
        run: The recipe.
        progress: Called with the part, what is done and the total.
        world: Its ranks share the writing by a model in this process; the first does the rest.

    Returns:
        The content of DATA/synthesis.json and "reused"; None on other ranks than the first.

    Raises:
        ConfigError: The model cannot be loaded or is not served, or the splits are not allowed.
        CheckpointError: A vector of the ranker is not finite.
        DataError: The data is missing or damaged, has no plain passage, or no query is left.
        EnvironmentProblem: The server fails, the disk is full, or another process writes the
            folder.
    """
    folder = check_replaceable(run.data.local_folder)

    def share(shown: Progress) -> None:
        if not run.synthesis.url:  # a server is asked by the first rank
            _answers(run, Manifest.load(folder.resolve()), world, shown)
        leave()

    return on_ranks(folder, world, share, lambda: _synthesize(run, folder, progress), progress)


def _synthesize(run: RunConfig, folder: Path, progress: Progress) -> dict[str, Any]:
    manifest = Manifest.load(folder)
    encoder = _ranker(run)
    fingerprint = _fingerprint(run, manifest, encoder)
    if (held := _held(manifest, fingerprint)) is not None:
        log.info("%s holds these queries already, reused", folder)
        return {**held, "reused": True}
    refuse_in_use(folder, ["cl"])
    passages, answers, refused = _answers(run, manifest, ALONE, progress)
    return _judge(run, manifest, passages, answers, refused, encoder, fingerprint, progress)


def _answers(
    run: RunConfig, manifest: Manifest, world: World, progress: Progress
) -> tuple[list[Record], Answers, dict[str, str]]:
    """Return the passages, their answers, and those that the server refused, with why."""
    passages = _passages(run, manifest)
    texts = {key(passage.text).hex(): passage.text for passage in passages}
    return passages, *ask(run, texts, _work(manifest), world, progress)


def _work(manifest: Manifest) -> Path:
    return manifest.folder.with_name(f"{manifest.folder.name}.synthesis")


def _passages(run: RunConfig, manifest: Manifest) -> list[Record]:
    """Return the plain passages of the chosen splits, without texts of eval; a draw by seed."""
    wanted = run.synthesis.passages
    if CONTROL in manifest.splits and "gl" in wanted:
        raise ConfigError(
            "synthesis.passages has gl, which states held-out facts under protocol knowledge; "
            "leave it out"
        )
    judged = {key(text) for record in judging.held_out(manifest) for text in record.texts()}
    names = {"cl": SYNTHESIZE.source_split(manifest), "gl": "gl"}
    found = [
        record
        for name in dict.fromkeys(names[name] for name in wanted)
        for record in read_split(manifest.folder, name)
        if record.text and key(record.text) not in judged
    ]
    if not found:
        raise DataError(
            f"{manifest.folder}: {' and '.join(wanted)} holds no plain passage, so there is "
            "nothing to write queries for; synthesis.passages names the splits"
        )
    most = run.synthesis.max_passages
    if most is not None and most < len(found):
        chosen = sorted(Random(run.seed).sample(range(len(found)), most))
        found = [found[number] for number in chosen]
    return found


def _ranker(run: RunConfig) -> Encoder | None:
    settings = run.synthesis
    if settings.keep_rank is None or settings.ranker == BM25:
        return None
    return Encoder(settings.ranker, trust_remote_code=run.mining.trust_remote_code)


def _settings(run: RunConfig) -> dict[str, Any]:
    """Return the settings that decide answers and rules."""
    plain: dict[str, Any] = json.loads(run.synthesis.model_dump_json(exclude=_OPERATION))
    return plain


def _fingerprint(run: RunConfig, manifest: Manifest, encoder: Encoder | None) -> str:
    """Return a hash of all that decides the pairs; the settings of the answers count for them."""
    splits = (SYNTHESIZE.source_split(manifest), "gl", *leaks.JUDGED)
    shards = [s.sha256 for name in splits for s in manifest.splits.get(name, [])]
    data = run.data
    rules = [data.min_chars, data.max_chars, data.min_tokens, data.max_tokens, data.languages]
    plain = [
        _RULES,
        lbr_ds.__version__,
        run.seed,
        data.records_per_shard,
        data.near_duplicate,
        rules,
        _settings(run),
        bool(run.synthesis.url) or run.model.backbone,
        encoder.fingerprint if encoder else BM25,
        shards,
    ]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _held(manifest: Manifest, fingerprint: str) -> dict[str, Any] | None:
    """Return the audit of data that has these queries already, else None."""
    path = manifest.folder / SYNTHESIS
    if SYNTHESIZE.kept not in manifest.splits or not path.is_file():
        return None
    try:
        audit: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError:
        return None
    return audit if audit.get("fingerprint") == fingerprint else None


def _judge(
    run: RunConfig,
    manifest: Manifest,
    passages: Sequence[Record],
    answers: Answers,
    server: dict[str, str],
    encoder: Encoder | None,
    fingerprint: str,
    progress: Progress,
) -> dict[str, Any]:
    """Apply the rules, write cl and return the audit."""
    refused = Refused(run.seed)
    given = list(read_split(manifest.folder, SYNTHESIZE.source_split(manifest)))
    written = judging.candidates(run, passages, answers)
    kept, found = judging.choose(
        run, manifest, given, written, encoder, refused, _work(manifest), progress
    )
    pairs = [candidate.pair() for candidate in kept]
    if not pairs:
        reasons = ", ".join(f"{n} {rule}" for rule, n in refused.counts.items() if n)
        raise DataError(
            f"{manifest.folder}: no query is left of {len(written)} ({reasons or 'no answers'}); "
            "see the answers in DATA.synthesis, and change synthesis.prompt, model or keep_rank"
        )
    audit = {
        "fingerprint": fingerprint,
        "program": lbr_ds.__version__,
        "seed": run.seed,
        "settings": _settings(run),
        "ranker": encoder.fingerprint if encoder else BM25,
        "passages": len(passages),
        "passages_refused_by_the_server": len(server),
        "passages_without_query": len(passages) - len({c.record.id for c in kept}),
        "queries_written": len(written),
        **_outcome(run, kept, found, refused),
        "server_refusals": sorted(set(server.values()))[:_SHOWN],
    }
    owners = _sources(manifest)
    made = [(record, owners.get(record.id, "")) for record in given if record.query]
    made += [(pair, owners.get(c.record.id, "")) for pair, c in zip(pairs, kept, strict=True)]
    made = [made[number] for number in permutation(len(made), manifest.seed, WRITE).tolist()]
    if any(owner for _, owner in made):
        made.sort(key=operator.itemgetter(1))
    records = [record for record, _ in made]
    rewrite(
        manifest,
        records,
        audit,
        run.data.records_per_shard,
        progress,
        verb=SYNTHESIZE,
        check=lambda new: judging.prove(new, run.data.near_duplicate),
        instructions=_with_pairs(manifest.instructions, records),
        sources=[owner for _, owner in made],
    )
    return {**audit, "reused": False}


def _sources(manifest: Manifest) -> dict[str, str]:
    """Return {record id: source of its shard} of cl and gl; {} where shards mix sources."""
    found: dict[str, str] = {}
    splits = ("gl", SYNTHESIZE.source_split(manifest))
    if not any(shard.source for split in splits for shard in manifest.shards(split)):
        return found
    for split in splits:
        shards = manifest.shards(split)
        owners = [shard.source for shard in shards for _ in range(shard.records)]
        records = read_split(manifest.folder, split)
        found |= {record.id: owner for record, owner in zip(records, owners, strict=True)}
    return found


def _outcome(
    run: RunConfig, kept: Sequence[Candidate], found: Sequence[int], refused: Refused
) -> dict[str, Any]:
    """Return the part of the audit that says what was kept and dropped, with examples."""
    drawn = sorted(Random(run.seed).sample(range(len(kept)), min(_EXAMPLES, len(kept))))
    return {
        "kept": len(kept),
        "dropped": dict(refused.counts),
        "ranks": {str(rank): n for rank, n in sorted(Counter(found).items())},
        "examples": [_example(kept[n], found[n] if found else None) for n in drawn],
        "examples_dropped": {
            reason: [_example(candidate) for candidate in shown]
            for reason, shown in sorted(refused.examples.items())
        },
    }


def _with_pairs(before: Instructions, records: Sequence[Record]) -> Instructions:
    """Return the instructions of the data with `records` as its cl."""
    counts: Counter[tuple[str, str | None, str]] = Counter()
    counts.update((r.source, r.instruction, r.document_instruction) for r in records)
    rows = {}
    for row in before.rows:
        rest = {split: n for split, n in row.records.items() if split not in ("cl", "given")}
        rows[row.source, row.query, row.document] = rest
    for name, number in counts.items():
        rows[name] = {**rows.get(name, {}), "cl": number}
    used = [Used(*name, split) for name, split in rows.items() if split]
    used.sort(key=lambda row: -sum(row.records.values()))
    return Instructions(tuple(used), before.more)


def _example(candidate: Candidate, rank: int | None = None) -> dict[str, Any]:
    """Return a query with its passage, truncated."""
    passage = candidate.record
    shown = {"id": passage.id, "query": candidate.query[:_CHARS], "passage": passage.text[:_CHARS]}
    return shown if rank is None else {**shown, "rank": rank}
