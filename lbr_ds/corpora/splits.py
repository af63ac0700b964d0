"""Records -> components that must stay whole -> gl, cl and eval.

Records that share a group or any normalised query, positive or passage are one component. It lands
in one split, and its records get one group: none is ever a negative of another.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b

from lbr_ds.config import SPLITS, SplitConfig
from lbr_ds.corpora.cleaning import key
from lbr_ds.corpora.reading import Tally
from lbr_ds.errors import DataError
from lbr_ds.records import Record

_FILLED = ("eval", "cl", "gl")  # in this order, so that a small corpus still has a judge


@dataclass(frozen=True)
class Component:
    """Records that belong together, sorted by id; `group` is theirs alone."""

    group: str
    records: list[Record]

    @property
    def pairs(self) -> int:
        """How many of the records are questions with answers."""
        return sum(1 for record in self.records if record.query)

    def most_shared(self) -> tuple[str, int]:
        """The text that most of the records have, and how many: why a large one is large."""
        counts: Counter[bytes] = Counter()
        texts: dict[bytes, str] = {}
        for record in self.records:
            own = {key(text): text for text in own_texts(record)}
            counts.update(own.keys())
            for name, text in own.items():
                texts.setdefault(name, text)
        most, number = counts.most_common(1)[0]
        return texts[most], number


def unite(records: list[Record]) -> list[Component]:
    """The components of `records`, sorted by group; independent of the order of `records`."""
    parents = list(range(len(records)))

    def root(node: int) -> int:
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    owners: dict[Hashable, int] = {}
    for node, record in enumerate(records):
        for link in _links(record):
            parents[root(node)] = root(owners.setdefault(link, node))
    members: dict[int, list[Record]] = {}
    for node, record in enumerate(records):
        members.setdefault(root(node), []).append(record)
    return sorted(map(_component, members.values()), key=lambda component: component.group)


def _links(record: Record) -> Iterator[Hashable]:
    """What ties a record to others."""
    if record.group:
        yield record.group
    yield from map(key, own_texts(record))


def own_texts(record: Record) -> list[str]:
    """The texts that must not be in two splits; negatives are `leaks.py`'s."""
    return replace(record, negatives=[]).texts()


def _component(members: list[Record]) -> Component:
    members = sorted(members, key=lambda record: record.id)
    groups = [record.group for record in members if record.group]
    group = min(groups) if groups else f"record:{members[0].id}"
    return Component(group, [replace(record, group=group) for record in members])


def divide(
    components: list[Component], sizes: SplitConfig, seed: int, dropped: Tally
) -> dict[str, list[Component]]:
    """Put each component into the first of eval, cl, gl that has room; shuffled by seed.

    Plain passages cannot be asked for, so beside pairs they go to gl only; a passage in one
    component with a pair of eval or cl is dropped. Raises DataError when a split cannot be filled.
    """
    room = _rooms(components, sizes)
    passages_only = not any(component.pairs for component in components)
    splits: dict[str, list[Component]] = {name: [] for name in SPLITS}
    left: list[Component] = []
    for component in sorted(components, key=lambda c: _draw(seed, c.group)):
        for name in _FILLED:
            everything = name == "gl" or passages_only
            size = len(component.records) if everything else component.pairs
            if 0 < size <= room[name]:
                room[name] -= size
                splits[name].append(
                    component if everything else _without_passages(component, name, dropped)
                )
                break
        else:
            left.append(component)
    _check(components, sizes, splits, room)
    for record in (record for component in left for record in component.records):
        dropped.add("beyond_the_sizes", f"{record.id}: {record.query or record.text}")
    return splits


def _draw(seed: int, group: str) -> bytes:
    """A random number of the component's own: other components do not move it."""
    return blake2b(f"{seed}:{group}".encode(), digest_size=16).digest()


def _rooms(components: list[Component], sizes: SplitConfig) -> dict[str, float]:
    """How many records each split may take."""
    if not sizes.are_shares:
        return {name: getattr(sizes, name) for name in SPLITS}
    pairs = sum(component.pairs for component in components)
    passages = sum(len(component.records) for component in components) - pairs
    total = pairs or passages
    room = {name: max(1.0, round(getattr(sizes, name) * total)) for name in SPLITS}
    if sizes.gl + sizes.cl + sizes.eval > 1 - 1e-9:
        room["gl"] = math.inf  # also what is too large for the others
    elif pairs:
        room["gl"] += passages
    return room


def _without_passages(component: Component, split: str, dropped: Tally) -> Component:
    for record in component.records:
        if not record.query:
            dropped.add(f"passage_in_{split}", f"{record.id}: {record.text}")
    return Component(component.group, [record for record in component.records if record.query])


def _check(
    components: list[Component],
    sizes: SplitConfig,
    splits: dict[str, list[Component]],
    room: dict[str, float],
) -> None:
    """Raise DataError for a split that is empty, or short of its count."""
    for name in SPLITS:
        if splits[name] and (sizes.are_shares or not room[name]):
            continue
        total = sum(len(component.records) for component in components)
        largest = max(components, key=lambda component: len(component.records))
        text, shared = largest.most_shared()
        asked = getattr(sizes, name)
        got = sum(len(component.records) for component in splits[name])
        raise DataError(
            f"data.splits.{name}={asked:g} cannot be filled (got {got}): after cleaning there are "
            f"{total} records in {len(components)} groups that must stay whole, the largest of "
            f"{len(largest.records)} ({largest.group}), {text[:40]!r} in {shared} of them; "
            "ask for less, add sources, or drop what ties them"
        )
