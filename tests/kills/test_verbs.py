"""Every verb is killed, again and again; repeated, it ends in the bytes of an undisturbed run.

`pytest -m kills` takes half an hour on two quiet cores; LBR_KILLS=5 makes it shorter. The default
run has the operations that put a folder in place, of `prepare` and `export`.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.kills.crash import run
from tests.kills.world import VERBS, Verb, World, differences, warm_up

KILLS = int(os.environ.get("LBR_KILLS", "30"))
LONG = ("reproduce", "demo")  # many trainings: a fifth of the kills


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    warm_up()
    return World.at(tmp_path_factory.mktemp("world"))


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` operations: half of them the last ones, half evenly before."""
    late = list(range(max(0, count - most // 2), count))
    before = count - len(late)
    number = min(before, most - len(late))
    return [place * before // number for place in range(number)] + late


def killed_at(world: World, verb: Verb, points: list[int], expected: dict[str, object]) -> None:
    for point in points:
        world.before(verb)
        assert run(lambda: verb(world.place), point) is None, f"operation {point} does not exist"
        run(lambda: verb(world.place))
        assert not differences(expected, world.contents()), f"killed before operation {point}"


@pytest.mark.kills
@pytest.mark.parametrize("name", VERBS)
def test_killed_at_random_instants(world: World, name: str) -> None:
    verb, draw = VERBS[name], random.Random(name)
    expected, kills = world.undisturbed(verb), 0
    while kills < (KILLS // 5 if name in LONG else KILLS):
        world.before(verb)
        for _ in range(draw.randint(1, 3)):
            kills += world.kill(verb, draw)
        run(lambda: verb(world.place))
        assert not differences(expected, world.contents()), f"after {kills} kills"
    print(f"{name}: {kills} kills at random, 0 differences, {world.seconds[name]:.1f} s alone")


@pytest.mark.kills
@pytest.mark.parametrize("name", [name for name in VERBS if name not in LONG])
def test_killed_at_operations_on_files(world: World, name: str) -> None:
    verb = VERBS[name]
    expected = world.undisturbed(verb)
    points = spread(world.counts[name], KILLS)
    killed_at(world, verb, points, expected)
    print(f"{name}: killed before {len(points)} of {world.counts[name]} operations, 0 differences")


def test_init_killed_as_it_puts_its_folders_in_place(tmp_path: Path) -> None:
    world, verb = World.at(tmp_path, count=40), VERBS["init"]
    expected = world.undisturbed(verb)
    killed_at(world, verb, spread(world.counts["init"], 8), expected)


def test_prepare_killed_as_it_puts_its_folder_in_place(tmp_path: Path) -> None:
    world, verb = World.at(tmp_path, count=40), VERBS["prepare"]
    expected = world.undisturbed(verb)
    killed_at(world, verb, spread(world.counts["prepare"], 6), expected)


def test_export_killed_as_it_puts_its_folder_in_place(tmp_path: Path) -> None:
    from lbr_ds.config import load
    from lbr_ds.export import export
    from lbr_ds.model.bottleneck import prepare_backbone

    world, verb = World.at(tmp_path, count=40), Verb("export", "export {}/run/backbone {}/model")

    def prepared() -> None:
        recipe = load(world.place / "recipe.yaml")
        prepare_backbone(recipe.model, recipe.bottleneck, recipe.run / "backbone", 0)

    assert export  # imported, so that no fork has to
    run(prepared)
    world.save("new")
    expected = world.undisturbed(verb)
    killed_at(world, verb, spread(world.counts["export"], 4), expected)
