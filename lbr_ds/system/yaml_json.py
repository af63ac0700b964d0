"""Read YAML and JSON strictly: what a file or an override says has one meaning, or is refused.

Refused are keys that stand twice, numbers that are none or not finite, values nested or repeated
(by YAML's aliases) without bounds, and files that are too large to be what they should be. Every
error is a ConfigError, or the kind that the caller names, of one short line. The only door through
which YAML is read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from lbr_ds.errors import ConfigError, LbrError, short
from lbr_ds.system.failures import reading

_MAX_BYTES = 4 << 20
_MAX_DEPTH = 40
_MAX_VALUES = 200_000  # with every alias counted as what it stands for


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses what has no one meaning, and reads 1e-4 as a number.

    YAML 1.1 reads 1e-4 as a text, since it lacks a point. Dates stay texts: a recipe has none.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # of a node already composed, by its id

    def compose_node(self, parent: Any, index: Any) -> Any:
        """PyYAML's own, within bounds."""
        event = self.peek_event()
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            self._refuse(f"nested more than {_MAX_DEPTH} deep", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if id(node) not in self._sizes:
            if isinstance(event, yaml.AliasEvent):
                self._refuse(
                    "an alias refers to a value that contains it; write the value out",
                    event.start_mark,
                )
            size = 1 + sum(self._sizes[id(part)] for part in _parts(node))
            self._sizes[id(node)] = size
            if size > _MAX_VALUES:
                self._refuse(f"aliases repeat more than {_MAX_VALUES} values", event.start_mark)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """PyYAML's own, but a key may stand only once."""
        seen: dict[Any, Any] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (first := seen.setdefault((key.tag, key.value), key)) is not key:
                self._refuse(
                    f"the key {short(key.value, 60)!r} is given twice, first in line "
                    f"{first.start_mark.line + 1}; remove one of them",
                    key.start_mark,
                )
        return super().construct_mapping(node, deep)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """PyYAML's own; a value that is none of its kind is named with its line."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, TypeError, AttributeError, KeyError, IndexError):
            kind = node.tag.rpartition(":")[2]
            self._refuse(
                f"{short(node.value, 60)!r} is no {kind}; correct it, or put a text in quotes",
                node.start_mark,
            )

    def _refuse(self, why: str, mark: Any) -> None:
        raise yaml.constructor.ConstructorError(None, None, why, mark)


def _parts(node: Any) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in known if not tag.endswith(":timestamp")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:\d[\d_]*(?:\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Return a YAML file's keys and values.

    Raises:
        ConfigError: the file cannot be read, is not strict YAML or holds no mapping; `what` says
            what it should be, as "a recipe".
    """
    with reading(path, what, ConfigError, "correct it"):
        if path.stat().st_size > _MAX_BYTES:
            mib = _MAX_BYTES >> 20
            raise ConfigError(f"{path}: larger than {mib} MiB, so not {what}; check the path")
        text = path.read_text(encoding="utf-8")
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        held = "is empty" if raw is None else f"holds a {type(raw).__name__}"
        raise ConfigError(
            f"{path}: {what} must be a YAML mapping (key: value), but the file {held}"
        )
    return raw


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of a YAML text. Raises ConfigError, which names it as `where`."""
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark and "\n" in text.strip() else ""
        raise ConfigError(f"{where}{line}: not readable as YAML: {short(error.problem)}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{where}: not readable as YAML: {short(error)}") from None
    finally:
        if loader is not None:
            loader.dispose()


def read_json(
    path: Path, what: str, kind: type[LbrError], cure: str = "make it again", *, strict: bool = True
) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        what: what the file should be, as "a ds_config".
        strict: whether NaN and Infinity are refused, which are no JSON but which Python writes,
            and files of more than a few MiB.

    Raises:
        LbrError: of the class `kind`: the file cannot be read, holds no JSON object, or an object
            has a key twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {short(key, 60)!r} is given twice")
            found[key] = value
        return found

    def refuse(word: str) -> float:
        raise ValueError(f"{word} is no number of JSON")

    options: Any = {"parse_constant": refuse, "parse_float": _finite} if strict else {}
    with reading(path, what, kind, cure):
        raw = path.read_bytes()
    if strict and len(raw) > _MAX_BYTES:
        raise kind(f"{path}: larger than {_MAX_BYTES >> 20} MiB, so not {what}; check the path")
    try:
        value = json.loads(raw, object_pairs_hook=once, **options)
    except (ValueError, RecursionError) as error:
        raise kind(f"{path}: not readable as JSON ({short(error)}); {cure}") from None
    if not isinstance(value, dict):
        raise kind(f"{path}: {what} is a JSON object, not {type(value).__name__}; {cure}")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{short(text, 40)} is out of range")
    return value
