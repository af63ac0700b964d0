"""Read YAML and JSON strictly: a file or an override has one meaning, or is an error.

Errors are duplicate keys, numbers that are malformed or not finite, values nested or repeated (by
YAML aliases) without bounds, and files that are too large. Each is a ConfigError, or of the class
that the caller gives, with one short line. All YAML of the package is read here.
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
_MAX_VALUES = 200_000  # an alias counts as the value it refers to


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses ambiguous values and reads 1e-4 as a number.

    YAML 1.1 reads 1e-4 as text, since it has no decimal point. Dates stay text.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # of a node already composed, by its id

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node as PyYAML does, within bounds of depth and size."""
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
        """Construct a mapping as PyYAML does, but refuse duplicate keys."""
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
        """Construct a value as PyYAML does; name a malformed one with its line."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, TypeError, AttributeError, KeyError, IndexError):
            kind = node.tag.rpartition(":")[2]
            self._refuse(
                f"{short(node.value, 60)!r} is not a valid {kind}; correct it, or quote a text",
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
        ConfigError: the file cannot be read, is not strict YAML, or is not a mapping. `what` says
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
        path: the file.
        what: what the file should be, as "a ds_config".
        kind: the class of the error to raise.
        cure: what to do about a file that cannot be read.
        strict: refuse NaN and Infinity, which are not JSON but which Python writes, and files of
            more than a few MiB.

    Raises:
        LbrError: of class `kind`: the file cannot be read, is not a JSON object, or has a
            duplicate key.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        unique: dict[str, Any] = {}
        for key, value in pairs:
            if key in unique:
                raise ValueError(f"the key {short(key, 60)!r} is given twice")
            unique[key] = value
        return unique

    def refuse(word: str) -> float:
        raise ValueError(f"{word} is not valid in JSON")

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
