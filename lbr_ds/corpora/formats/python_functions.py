"""Read Python source: a row per documented function, with its docstring and its code without it.

A row has `docstring` (its first sentence), `code` (the source without the docstring, dedented, with
the function's own name replaced by `function`), `name`, `module` and `file`. The source is a .py
file, a folder (`python:stdlib` and `python:PACKAGE` are folders), or a wheel; nothing is imported
or run. Tests, special methods (`__init__`) and functions with fewer than four words of docstring or
three statements are left out.
"""

from __future__ import annotations

import ast
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from lbr_ds.config import ColumnsConfig, SourceConfig
from lbr_ds.corpora.formats.interface import Format, Row, files_below
from lbr_ds.errors import DataError

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3"}
_SENTENCE = re.compile(r"(.+?[.!?])(?:\s|$)", re.DOTALL)
_MIN_WORDS, _MIN_STATEMENTS = 4, 3
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def read_functions(path: Path, source: SourceConfig) -> Iterator[Row]:
    """Yield a row per function, with key FILE-LINE; a file that cannot be parsed is one error."""
    for inside, raw in source_files(path):
        where = f"{path}/{inside}" if path.is_dir() or path.suffix == ".whl" else str(path)
        try:
            text = raw.decode("utf-8-sig")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes of the corpus
                tree = ast.parse(text)
        except UnicodeDecodeError as error:
            yield Row(where, inside, DataError(f"{where}: not UTF-8 at byte {error.start}"))
            continue
        except (SyntaxError, ValueError, RecursionError) as error:
            yield Row(where, inside, DataError(f"{where}: not Python ({error})"))
            continue
        yield from _functions(tree, text.splitlines(), where, inside)


def source_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of each source file in a file, folder or wheel, without tests."""
    try:
        if path.suffix == ".whl":
            with zipfile.ZipFile(path) as wheel:
                for name in sorted(wheel.namelist()):
                    if name.endswith(".py") and _wanted(PurePosixPath(name)):
                        yield name, wheel.read(name)
            return
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path}: not a wheel ({error}); fetch it again") from None
    for file in files_below(path, (".py",)):
        inside = file.relative_to(path) if path.is_dir() else Path(file.name)
        if _wanted(PurePosixPath(inside)):
            yield inside.as_posix(), file.read_bytes()


def _wanted(inside: PurePosixPath) -> bool:
    return not _LEFT_OUT & set(inside.parts) and not inside.name.startswith("test_")


def _functions(tree: ast.Module, lines: list[str], where: str, inside: str) -> Iterator[Row]:
    for node in ast.walk(tree):
        if not isinstance(node, _Function):
            continue
        if node.name.startswith("__") or len(node.body) <= _MIN_STATEMENTS:
            continue
        about = ast.get_docstring(node)
        code = _without_docstring(node, lines) if about else ""
        if not about or not code:
            continue
        match = _SENTENCE.match(about.split("\n\n")[0])
        sentence = " ".join((match[1] if match else about.split("\n\n")[0]).split())
        if len(sentence.split()) < _MIN_WORDS:
            continue
        yield Row(
            f"{where}:{node.lineno}",
            f"{inside}-{node.lineno}",
            {
                "docstring": sentence,
                "code": re.sub(rf"\b{node.name}\b", "function", code),
                "name": node.name,
                "module": inside.removesuffix(".py").removesuffix("/__init__").replace("/", "."),
                "file": inside,
            },
        )


def _without_docstring(node: _Function, lines: list[str]) -> str:
    """Return the function's source from `def` on; empty if its docstring shares a line."""
    about = node.body[0]
    # A body on one line with others (`def f(): "doc"; return 1`) cannot be cut by lines.
    shared = node.body[1].lineno <= (about.end_lineno or about.lineno)
    if shared or about.lineno == node.lineno:
        return ""
    head = lines[node.lineno - 1 : about.lineno - 1]
    body = lines[about.end_lineno : node.end_lineno]
    # Not textwrap.dedent: a line inside a string may be indented less.
    indent = lines[node.lineno - 1][: node.col_offset]
    return "\n".join(line.removeprefix(indent) for line in head + body)


PYTHON = Format(
    read_functions,
    suffixes=(".py", ".whl"),
    columns=ColumnsConfig(query="docstring", positives="code"),
    is_text=False,
    keep_lines=True,
    files=source_files,
)
