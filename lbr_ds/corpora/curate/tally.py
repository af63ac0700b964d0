"""Count what each rule left out, with examples."""

from __future__ import annotations

from typing import Any

EXAMPLES, EXAMPLE_CHARS = 3, 160


class Tally:
    """How often each rule left something out, with the first examples."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.examples: dict[str, list[str]] = {}

    def add(self, rule: str, example: str, count: int = 1) -> None:
        """Count something that `rule` left out."""
        self.counts[rule] = self.counts.get(rule, 0) + count
        examples = self.examples.setdefault(rule, [])
        if len(examples) < EXAMPLES:
            shortened = example[: EXAMPLE_CHARS - 3] + "..."
            examples.append(example if len(example) <= EXAMPLE_CHARS else shortened)

    def add_some(self, rule: str, examples: list[str], count: int) -> None:
        """Count what `rule` left out at once; examples: the first ones, at most EXAMPLES."""
        for example in examples:
            self.add(rule, example)
        if count > len(examples):
            self.add(rule, "", count - len(examples))

    def to_dict(self) -> dict[str, Any]:
        """Return {rule: {"count", "examples"}}, rules in alphabetical order."""
        return {
            rule: {"count": self.counts[rule], "examples": self.examples[rule]}
            for rule in sorted(self.counts)
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Tally:
        """Return the tally that `to_dict` was called on."""
        tally = cls()
        tally.counts = {rule: entry["count"] for rule, entry in plain.items()}
        tally.examples = {rule: list(entry["examples"]) for rule, entry in plain.items()}
        return tally
