"""Every key of a recipe is described once, and the stored reference and schema are those of now."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from lbr_ds.cli import app
from lbr_ds.config import OBJECTIVES, load
from lbr_ds.config.reference import keys, markdown, schema
from lbr_ds.system import resources

FOLDER = resources.shipped_folder("recipes")
RECIPES = sorted(p.stem for p in FOLDER.glob("*.yaml"))
SCHEMA = schema()
SCHEMA_NAME = "recipe.schema.json"
MAKE = "run: lbr-ds config --{} > lbr_ds/recipes/{}"


def printed(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["config", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def leaves(value: Any, prefix: str = "") -> set[str]:
    """The dotted names of a recipe's values, as the reference spells them."""
    if isinstance(value, dict):
        return {n for k, v in value.items() for n in leaves(v, f"{prefix}.{k}" if prefix else k)}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {name for one in value for name in leaves(one, f"{prefix}[]")} | {prefix}
    return {prefix}


def test_every_key_has_a_description_of_one_or_a_few_sentences() -> None:
    named = list(keys())
    assert len([key for key in named if not key.is_section]) > 110
    for key in named:
        assert key.meaning.endswith("."), key.name
        assert 15 < len(key.meaning) < 300, key.name
    assert len({key.name for key in named}) == len(named)


@pytest.mark.parametrize("name", RECIPES)
def test_every_key_of_a_resolved_recipe_is_in_the_reference(name: str) -> None:
    # Mappings of the user's own names or numbers.
    free_form = ("data.sources[].where", "stage1.objective", "stage2.matryoshka")
    known = {key.name for key in keys()}
    for leaf in leaves(yaml.safe_load(load(name).dump())):
        assert leaf in known or leaf.startswith(free_form), leaf


KINDS: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "string": (str,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def fits(part: dict[str, Any], value: Any) -> bool:
    """Whether a value conforms to a part of the schema, in those keywords that it uses."""
    if "$ref" in part:
        return fits(SCHEMA["$defs"][part["$ref"].rpartition("/")[2]], value)
    if "anyOf" in part:
        return any(fits(one, value) for one in part["anyOf"])
    kinds = part.get("type", list(KINDS))
    names = [kinds] if isinstance(kinds, str) else kinds
    if not any(isinstance(value, KINDS[name]) for name in names):
        return False
    if value not in part.get("enum", [value]) or value != part.get("const", value):
        return False
    if isinstance(value, dict):
        inner, other = part.get("properties", {}), part.get("additionalProperties", True)
        known = (fits(inner[k], v) if k in inner else bool(other) for k, v in value.items())
        return set(part.get("required", ())) <= set(value) and all(known)
    if isinstance(value, list):
        return all(fits(part.get("items", {}), one) for one in value)
    if isinstance(value, (int, float)):
        return part.get("minimum", value) <= value <= part.get("maximum", value)
    return True


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_conforms_to_the_schema(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text()
    assert fits(SCHEMA, yaml.safe_load(text))


@pytest.mark.parametrize(
    "override",
    ["{modle: {}}", "{seed: text}", "{seed: -1}", "{stage1: {objective: sft}}", "{every: 1}"],
)
def test_the_schema_refuses_what_is_wrong(override: str) -> None:
    raw = yaml.safe_load((FOLDER / "demo.yaml").read_text())
    assert not fits(SCHEMA, {**raw, **yaml.safe_load(override)})


def test_stored_files_are_those_of_now() -> None:
    assert (FOLDER / "REFERENCE.md").read_text() == markdown(), MAKE.format(
        "markdown", "REFERENCE.md"
    )
    stored = json.loads((FOLDER / SCHEMA_NAME).read_text())
    assert stored == schema(), MAKE.format("schema", SCHEMA_NAME)
    for name in RECIPES:
        first = (FOLDER / f"{name}.yaml").read_text().splitlines()[0]
        assert first == f"# yaml-language-server: $schema={SCHEMA_NAME}"


def test_config_prints_what_a_run_folder_gets() -> None:
    address = "data.folder=https://me:hidden@host/a?key=secret"
    output = printed("demo", address, "stage1.num_steps=7")
    assert output == load("demo", [address, "stage1.num_steps=7"]).dump()
    assert "hidden" not in output
    assert "secret" not in output
    assert yaml.safe_load(output)["stage1"]["num_steps"] == 7


def test_config_prints_reference_and_schema() -> None:
    assert printed("--reference") == printed("--markdown") == markdown()
    assert json.loads(printed("--schema")) == schema()


def test_the_schema_knows_what_the_recipe_reader_accepts() -> None:
    """A name for a mixture, a string for an instruction, a step's number for a start."""
    parts = SCHEMA["$defs"]
    mixture, name = parts["Stage1Config"]["properties"]["objective"]["anyOf"]
    assert name["enum"] == mixture["propertyNames"]["enum"] == list(OBJECTIVES)
    _, text = parts["SourceConfig"]["properties"]["instruction"]["anyOf"]
    assert text["type"] == "string"
    assert parts["Stage2Config"]["properties"]["from"]["type"] == ["string", "integer"]
