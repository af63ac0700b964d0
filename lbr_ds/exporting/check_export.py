"""Compare the vectors of any installation or server with those that an export was proven with.

    python check_export.py                          # sentence-transformers, as installed here
    python check_export.py --backend onnx           # its ONNX backend
    python check_export.py --url http://localhost:8000/v1/embeddings --model NAME

A copy of this file is part of every exported folder and runs on its own: it needs Python 3.10 or
newer and, unless --url is given, sentence-transformers. The reference vectors are in `parity.json`;
they were computed in fp32 by the code that trained the model. Serve the model in fp32 to compare
with the default limit; half precision needs --limit 0.01 or so.

sentence-transformers up to 5.2 removes white space around a text, and training does not. This is
reported, and is not counted as a difference.

Exit code: 0 when all vectors agree, 1 when one differs, 2 when the comparison cannot be made.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_BATCH_SIZES = (1, 3, 64)  # alone, mixed lengths with padding, all texts together
_PACKAGES = ("sentence-transformers", "transformers", "tokenizers", "torch", "onnxruntime")
_SHOWN = 48  # characters of a text in a line of the table
_TIMEOUT = 600  # seconds for one request; a CPU server needs long for long texts


class Unusable(Exception):
    """The comparison cannot be made; the message says why and what to do."""


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison, print a table and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        texts, expected, limit = read_parity(options.folder)
        limit = options.limit or limit
        encodings: Sequence[Sequence[list[float] | None]]
        if options.url:
            print(f"server: {options.url}")
            encodings = [_Server(options).encode(texts)]
        else:
            encodings = _installed(options.folder, options.backend, texts)
    except Unusable as error:
        print(f"check_export: {error}", file=sys.stderr)
        return 2
    references = dict(zip(texts, expected, strict=True))
    worst, stripped = [], []
    for text, of_one_text in zip(texts, zip(*encodings, strict=True), strict=True):
        value = _largest(of_one_text, references[text])
        bare = references.get(text.strip())
        if value is not None and value > limit and bare is not None:
            without = _largest(of_one_text, bare)
            if without is not None and without <= limit:
                value = without
                stripped.append(text)
        worst.append(value)
    return report(texts, worst, limit, stripped)


def _largest(made: Sequence[list[float] | None], reference: list[float]) -> float | None:
    """Return the largest difference of these vectors; None if the server refused the text."""
    return max((difference(v, reference) for v in made if v is not None), default=None)


def report(
    texts: list[str], worst: list[float | None], limit: float, stripped: Sequence[str] = ()
) -> int:
    """Print a line for each text and the verdict.

    Args:
        texts: The texts that were compared.
        worst: The largest difference for each; None for a text that the server refused.
        limit: The largest difference that counts as agreement.
        stripped: The texts whose vectors are those of the text without white space around it.

    Returns:
        0 when all vectors agree, else 1.
    """
    for text, value in zip(texts, worst, strict=True):
        shown = "  refused" if value is None else f"{value:9.1e}"
        mark = "" if value is None or value <= limit else "  DIFFERS"
        mark = "  WHITE SPACE REMOVED" if text in stripped else mark
        print(f"{shown}  {len(text):6d} characters  {_short(text)}{mark}")
    compared = [value for value in worst if value is not None]
    largest = max(compared)
    verdict = "agree" if largest <= limit else "DO NOT agree"
    print(f"{len(compared)} texts {verdict}; largest difference {largest:.1e} (limit {limit:.0e})")
    if stripped:
        print(
            "This installation removes white space around a text before it is tokenized, which "
            "changes the vector. Remove it from your queries and documents yourself, so that all "
            "programs give the same vectors, or install sentence-transformers 5.7 or newer."
        )
    return 0 if largest <= limit else 1


def read_parity(folder: Path) -> tuple[list[str], list[list[float]], float]:
    """Return the texts, their reference vectors and the limit that `parity.json` holds.

    Raises:
        Unusable: The file is missing or holds no vectors.
    """
    path = folder / "parity.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return stored["texts"], stored["vectors"], float(stored["limit"])
    except FileNotFoundError:
        raise Unusable(f"{path}: no such file; give a folder made by `lbr-ds export`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unusable(f"{path}: holds no reference vectors ({error}); export again") from None


def difference(vector: list[float], expected: list[float]) -> float:
    """Return the largest absolute difference of a component; infinity for NaN or another size."""
    if len(vector) != len(expected):
        return math.inf
    largest = max(abs(a - b) for a, b in zip(vector, expected, strict=True))
    return largest if math.isfinite(sum(vector)) else math.inf


def _installed(folder: Path, backend: str, texts: list[str]) -> list[list[list[float]]]:
    """Encode the texts by sentence-transformers in fp32 on the CPU, once for each batch size."""
    from importlib import metadata

    versions = []
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    print("installed:", ", ".join(versions) or "nothing of use")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise Unusable(f"sentence-transformers cannot be imported: {error}; install it") from None
    options: dict[str, Any] = {"device": "cpu", "trust_remote_code": False}
    if backend != "torch":
        options["backend"] = backend  # older releases have no such argument
        if (folder / "onnx" / "model.onnx").is_file():
            options["model_kwargs"] = {"file_name": "onnx/model.onnx"}
    model = SentenceTransformer(str(folder), **options)
    if backend == "torch":
        model.float()
    sizes = [size for size in _BATCH_SIZES if size <= len(texts)] + [len(texts)]
    made = (
        model.encode(texts, batch_size=n, show_progress_bar=False) for n in dict.fromkeys(sizes)
    )
    return [vectors.tolist() for vectors in made]


class _Server:
    """A server with an OpenAI-compatible embeddings endpoint (vLLM, infinity, TEI)."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.url, self.key = options.url, options.api_key
        self.model = options.model or options.folder.resolve().name

    def encode(self, texts: list[str]) -> list[list[float] | None]:
        """Return a vector for each text, by one request for all where the server accepts that.

        None is returned for the empty text where the server refuses it, as TEI does.
        """
        try:
            return [*self._post(texts, {})]
        except urllib.error.HTTPError as error:
            if error.code not in (400, 413, 422):
                raise Unusable(f"{self.url}: HTTP {error.code}: {_body(error)}") from None
        return [self._alone(text) for text in texts]

    def _alone(self, text: str) -> list[float] | None:
        """Encode one text; a server that refuses an overlong one is asked to truncate it."""
        reason = ""
        for extra in ({}, {"truncate_prompt_tokens": -1}, {"truncate": True}):
            try:
                return self._post([text], extra)[0]
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}: {_body(error)}"
        if not text:
            return None
        raise Unusable(f"{self.url} refuses {_short(text)}: {reason}")

    def _post(self, texts: list[str], extra: dict[str, Any]) -> list[list[float]]:
        content = {"model": self.model, "input": texts, "encoding_format": "float", **extra}
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, json.dumps(content).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
                rows = json.loads(answer.read())["data"]
        except urllib.error.HTTPError:
            raise
        except (urllib.error.URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            raise Unusable(f"{self.url}: no answer ({reason}); is the server running?") from None
        except (ValueError, KeyError, TypeError) as error:
            raise Unusable(f"{self.url}: not an embeddings endpoint ({error!r})") from None
        return [row["embedding"] for row in sorted(rows, key=lambda row: row["index"])]


def _body(error: urllib.error.HTTPError) -> str:
    """Return the beginning of an error's text."""
    return " ".join(error.read().decode("utf-8", "replace").split())[:200]


def _short(text: str) -> str:
    shown = " ".join(text.split())
    return repr(shown if len(shown) <= _SHOWN else shown[: _SHOWN - 1] + "\u2026")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        epilog="Example: python check_export.py --url http://localhost:8000/v1/embeddings",
    )
    default = Path(__file__).resolve().parent
    here = (default / "parity.json").is_file()
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?" if here else None,
        default=default,
        help="the exported folder" + ("; default: the one of this file" if here else ""),
    )
    parser.add_argument("--url", help="an OpenAI-compatible embeddings endpoint to compare")
    parser.add_argument("--model", help="the model's name on that server; default: the folder's")
    parser.add_argument("--api-key", help="sent as a bearer token")
    parser.add_argument(
        "--backend",
        default="torch",
        choices=["torch", "onnx", "openvino"],
        help="of sentence-transformers",
    )
    parser.add_argument("--limit", type=float, help="largest difference; default: the export's own")
    return parser


if __name__ == "__main__":
    sys.exit(main())
