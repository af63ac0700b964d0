"""From stored answers to the pairs that are kept, and the proof that they leak nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from lbr_ds.config import RunConfig
from lbr_ds.corpora.curate import leaks
from lbr_ds.corpora.curate.cleaning import Rules
from lbr_ds.corpora.curate.segmentation import key
from lbr_ds.corpora.formats.shapes import source_name
from lbr_ds.encoder import Encoder
from lbr_ds.errors import DataError
from lbr_ds.records import Record
from lbr_ds.shards import Manifest, read_split
from lbr_ds.synthesis.answers import Answers
from lbr_ds.synthesis.prompts import parse
from lbr_ds.synthesis.round_trip import ranks
from lbr_ds.synthesis.rules import Candidate, Refused, distinct, family_roots, well_formed
from lbr_ds.system.progress import Progress


def held_out(manifest: Manifest) -> Iterator[Record]:
    """Yield the records of eval and control."""
    splits = (name for name in leaks.JUDGED if name in manifest.splits)
    return chain.from_iterable(read_split(manifest.folder, name) for name in splits)


def candidates(run: RunConfig, passages: Sequence[Record], answers: Answers) -> list[Candidate]:
    """Return all queries of all answers, by passage and number."""
    instructions, made = _query_instructions(run), []
    for passage in passages:
        instruction = passage.instruction or instructions.get(passage.source, "")
        asking = replace(passage, instruction=instruction)
        texts = parse(answers.get(key(passage.text).hex()) or "")
        made += [Candidate(asking, number, text) for number, text in enumerate(texts, 1)]
    return made


def _query_instructions(run: RunConfig) -> dict[str, str]:
    """Return {source: query instruction} of the recipe: plain passages have none of their own."""
    sources = run.data.sources
    return {source_name(s, Path(s.path)): s.instruction.query for s in sources}


def choose(
    run: RunConfig,
    manifest: Manifest,
    given: Sequence[Record],
    written: Sequence[Candidate],
    encoder: Encoder | None,
    refused: Refused,
    work: Path,
    progress: Progress,
) -> tuple[list[Candidate], list[int]]:
    """Return the kept queries and, with keep_rank, the rank of the passage of each.

    Args:
        run: The recipe.
        manifest: Of the data.
        given: The records of cl before.
        written: All written queries.
        encoder: Ranks the passages; None: BM25.
        refused: Counts the queries that are dropped.
        work: The folder beside the data.
        progress: Called with what has been done.
    """
    near, settings, folder = run.data.near_duplicate, run.synthesis, manifest.folder
    gl = list(read_split(folder, "gl"))
    new = distinct(
        well_formed(written, _rules(run, work), near, settings.queries, refused),
        (text for record in held_out(manifest) for text in record.texts()),
        (record.query for record in (*given, *gl) if record.query),
        near,
        refused,
        work,
        progress,
    )
    if settings.keep_rank is None:
        return new, []
    pairs, last = [candidate.pair() for candidate in new], settings.keep_rank
    found = ranks(pairs, [*given, *gl], held_out(manifest), last, encoder, work, progress)
    kept: list[Candidate] = []
    placed: list[int] = []
    for candidate, rank in zip(new, found if pairs else (), strict=True):
        if rank is None:
            refused.add("not_retrieved", candidate)
        else:
            kept.append(candidate)
            placed.append(rank)
    return kept, placed


def _rules(run: RunConfig, work: Path) -> Rules:
    """Return the rules of `data` for a query."""
    data, tokenizer = run.data, ""
    if data.counts_tokens:
        from lbr_ds.corpora.token_counts import tokenizer_json

        file = work / "tokenizer.json"
        file.write_text(tokenizer_json(run.model), encoding="utf-8")
        tokenizer = str(file)
    return Rules(
        data.min_chars,
        data.max_chars,
        data.min_tokens or 0,
        data.max_tokens,
        tokenizer,
        data.languages,
        keep_lines=False,
        max_shared_letters=None,
    )


def prove(folder: Path, near: float) -> None:
    """Prove from the shards as written that no text of cl equals one of eval, nor a query nearly.

    The passages were proved by `prepare`.

    Raises:
        DataError: A text is shared.
    """
    leaks.prove_no_equal_texts(folder)
    manifest = Manifest.load(folder)
    judged = [text for record in held_out(manifest) for text in record.texts()]
    queries = [record.query for record in read_split(folder, "cl")]
    roots = family_roots([*judged, *queries], near, folder.parent)
    shared = sum(root < len(judged) for root in roots[len(judged) :])
    if shared:
        raise DataError(
            f"{folder}: {shared} queries of cl are near a text of eval; report this bug"
        )
