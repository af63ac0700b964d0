"""Files that travel with the program: recipes, ds_configs, SLURM templates.

A wheel carries them inside the package; in a checkout `ds_configs/` and `slurm/` stand beside it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from lbr_ds.errors import ConfigError, short
from lbr_ds.system.atomic import atomic_folder, try_recover

PACKAGE = Path(__file__).parent.parent
FOLDERS = ("recipes", "ds_configs", "slurm")


def shipped_folder(name: str) -> Path:
    """The folder `name` (one of FOLDERS), wherever this installation keeps it."""
    inside, beside = PACKAGE / name, PACKAGE.parent / name
    return inside if inside.is_dir() else beside


def find_shipped(kind: str, name: str, suffix: str) -> Path:
    """A file by path, or by bare name among those that travel with the program.

    Raises ConfigError that lists the names when there is none.
    """
    for path in (Path(name), shipped_folder(kind) / name, shipped_folder(kind) / f"{name}{suffix}"):
        if path.is_file():
            return path
    names = ", ".join(sorted(p.stem for p in shipped_folder(kind).glob(f"*{suffix}")))
    shipped = f"one of the shipped {kind}: {names}"
    raise ConfigError(f"no file {short(name)!r}; give a path, or {shipped}")


def copy_shipped(target: Path) -> list[Path]:
    """Copy recipes, ds_configs and slurm into `target`. Returns the files.

    A folder that is there with the same contents is left alone. Raises ConfigError for another.
    """
    missing = [name for name in FOLDERS if not (target / name).exists()]
    for name in FOLDERS:
        if name not in missing and _contents(target / name) != _contents(shipped_folder(name)):
            raise ConfigError(
                f"{target / name} exists already and differs from the one that is shipped; "
                "give a new folder"
            )
    for name in FOLDERS:
        if name not in missing:
            try_recover(target / name)
            continue
        with atomic_folder(target / name) as made:
            for path, content in _contents(shipped_folder(name)).items():
                (made / path).parent.mkdir(parents=True, exist_ok=True)
                (made / path).write_bytes(content)
                shutil.copymode(shipped_folder(name) / path, made / path)
    return sorted(p for name in FOLDERS for p in (target / name).rglob("*") if p.is_file())


def _contents(place: Path) -> dict[Path, bytes]:
    """Every file below a folder, without Python's."""
    return {
        path.relative_to(place): path.read_bytes()
        for path in place.rglob("*")
        if path.is_file() and path.name != "__init__.py" and "__pycache__" not in path.parts
    }
