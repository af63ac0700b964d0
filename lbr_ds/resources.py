"""Files that travel with the program: recipes, ds_configs, SLURM templates.

A wheel carries them inside the package; in a checkout `ds_configs/` and `slurm/` stand beside it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from lbr_ds.errors import ConfigError, short

PACKAGE = Path(__file__).parent
FOLDERS = ("recipes", "ds_configs", "slurm")


def folder(name: str) -> Path:
    """The folder `name` (one of FOLDERS), wherever this installation keeps it."""
    inside, beside = PACKAGE / name, PACKAGE.parent / name
    return inside if inside.is_dir() else beside


def find(kind: str, name: str, suffix: str) -> Path:
    """A file by path, or by bare name among those that travel with the program.

    Raises ConfigError that lists the names when there is none.
    """
    for path in (Path(name), folder(kind) / name, folder(kind) / f"{name}{suffix}"):
        if path.is_file():
            return path
    names = ", ".join(sorted(p.stem for p in folder(kind).glob(f"*{suffix}")))
    shipped = f"one of the shipped {kind}: {names}"
    raise ConfigError(f"no file {short(name)!r}; give a path, or {shipped}")


def copy_all(target: Path) -> list[Path]:
    """Copy recipes, ds_configs and slurm into `target`; refuses to overwrite. Returns the files."""
    existing = [target / name for name in FOLDERS if (target / name).exists()]
    if existing:
        raise ConfigError(f"{existing[0]} exists already; give a new folder")
    for name in FOLDERS:
        ignore = shutil.ignore_patterns("__pycache__", "__init__.py")
        shutil.copytree(folder(name), target / name, ignore=ignore)
    return sorted(p for name in FOLDERS for p in (target / name).rglob("*") if p.is_file())
