"""Every verb is killed, again and again; repeated, it ends in the bytes of an undisturbed run.

`pytest -m kills` takes half an hour on two quiet cores; LBR_KILLS=5 makes it shorter. The default
run has the operations that put a folder in place, of `prepare` and `export`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kills.crash import run
from tests.kills.world import VERBS, Verb, World, differences, warm_up

KILLS = int(os.environ.get("LBR_KILLS", "30"))
LONG = ("reproduce", "demo")  # many trainings: killed again and again on the way to their end


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


def killed_on_the_way(
    world: World, verb: Verb, expected: dict[str, object], kill: Callable[[], bool]
) -> None:
    """Kill `verb` and start it again until it has ended by itself; compare; until KILLS have hit.

    kill: starts the verb, and returns whether it was killed before its end.
    """
    reached: list[int] = []  # how many of the expected files there were at each kill
    runs = 0
    while len(reached) < KILLS:
        world.before(verb)
        present = sum((world.place / name).exists() for name in expected)
        while len(reached) < KILLS and kill():
            reached.append(sum((world.place / name).exists() for name in expected) - present)
        run(lambda: verb(world.place))
        assert not differences(expected, world.contents()), f"after {len(reached)} kills"
        runs += 1
    made = len(expected) - present
    print(
        f"{verb.name}: {KILLS} kills in {runs} runs to the end, 0 differences, "
        f"{world.seconds[verb.name]:.1f} s alone; of {made} files there were at a kill: "
        f"{' '.join(map(str, sorted(reached)))}"
    )


@pytest.mark.kills
@pytest.mark.parametrize("name", LONG)
def test_long_verbs_killed_at_random_instants(world: World, name: str) -> None:
    verb, draw = VERBS[name], random.Random(name)
    expected = world.undisturbed(verb)
    killed_on_the_way(world, verb, expected, lambda: world.kill(verb, draw))


@pytest.mark.kills
@pytest.mark.parametrize("name", LONG)
def test_long_verbs_killed_at_operations_on_files(world: World, name: str) -> None:
    verb, draw = VERBS[name], random.Random(name)
    expected = world.undisturbed(verb)

    def kill() -> bool:
        return run(lambda: verb(world.place), draw.randrange(world.counts[name])) is None

    killed_on_the_way(world, verb, expected, kill)


@pytest.mark.kills
@pytest.mark.parametrize("name", [name for name in VERBS if name not in LONG])
def test_killed_at_random_instants(world: World, name: str) -> None:
    verb, draw = VERBS[name], random.Random(name)
    expected, kills = world.undisturbed(verb), 0
    while kills < KILLS:
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
    from lbr_ds.exporting import export
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
