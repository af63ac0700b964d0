"""Let a server or a model in this process answer for every passage that has no stored answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from lbr_ds.config import RunConfig
from lbr_ds.config.synthesis import SynthesisConfig
from lbr_ds.distributed import World
from lbr_ds.synthesis.answers import Answers
from lbr_ds.synthesis.prompts import messages
from lbr_ds.system.progress import Progress

_SETTINGS = {
    "prompt",
    "domain",
    "examples",
    "queries",
    "passage_chars",
    "temperature",
    "max_tokens",
}


def ask(
    run: RunConfig, passages: dict[str, str], work: Path, world: World, progress: Progress
) -> tuple[Answers, dict[str, str]]:
    """Store an answer for each passage, unless there is one.

    Args:
        run: The recipe.
        passages: {hash of the text: text}.
        work: The folder beside the data.
        world: Its ranks share the passages of a model in this process; one rank asks a server.
        progress: Called with the answers that there are.

    Returns:
        The answers of this rank and those that were stored before, and {hash of a passage: why the
        server refused the request}.
    """
    if run.synthesis.url:
        return _ask_server(run, passages, work, progress)
    return _ask_model(run, passages, work, world, progress), {}


def _folder(work: Path, settings: SynthesisConfig, *others: object) -> Path:
    """Return the folder of the answers to one prompt by one model."""
    plain = [json.loads(settings.model_dump_json(include=_SETTINGS)), *others]
    name = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:20]
    return work / name


def _ask_server(
    run: RunConfig, passages: dict[str, str], work: Path, progress: Progress
) -> tuple[Answers, dict[str, str]]:
    from lbr_ds.synthesis.endpoint import Endpoint, Question

    endpoint = Endpoint(run.synthesis)
    if not endpoint.model:
        endpoint.check()
    folder = _folder(work, run.synthesis, "server", endpoint.model, run.seed)
    refused: dict[str, str] = {}
    with Answers(folder) as answers:
        missing = [name for name in passages if name not in answers]
        if missing:
            endpoint.check()

        def questions() -> Iterator[Question]:
            for name in missing:
                yield Question(name, messages(run.synthesis, passages[name]), _seed(run, name))

        done = len(passages) - len(missing)
        for answer in endpoint.ask(questions()):
            if answer.refused:
                refused[answer.passage] = answer.refused
            else:
                answers.add(answer.passage, answer.text)
            done += 1
            progress(f"ask {endpoint.model}", done, len(passages))
    return answers, refused


def _ask_model(
    run: RunConfig, passages: dict[str, str], work: Path, world: World, progress: Progress
) -> Answers:
    settings = run.synthesis
    size, name = settings.concurrency, settings.model or run.model.backbone
    folder = _folder(work, settings, "model", name, run.seed, size)
    names = list(passages)
    with Answers(folder, world.rank) as answers:
        blocks = [names[i : i + size] for i in range(0, len(names), size)]
        own = range(world.rank, len(blocks), world.size)
        missing = [n for n in own if any(passage not in answers for passage in blocks[n])]
        if missing:
            from lbr_ds.synthesis.local import LocalModel

            model = LocalModel(run)
        for done, number in enumerate(missing, 1):
            block = blocks[number]
            chats = [messages(settings, passages[passage]) for passage in block]
            texts = model.answer(chats, _seed(run, *block))
            for passage, text in zip(block, texts, strict=True):
                answers.add(passage, text)
            progress(f"write queries ({name})", done * size, len(missing) * size)
    return answers


def _seed(run: RunConfig, *passages: str) -> int:
    """Return the seed of an answer: it depends on the run's and on the passages alone."""
    text = " ".join((str(run.seed), *passages))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
