"""The files shipped with the program: recipes, ds_configs, SLURM scripts, examples.

A wheel has them inside the package; in a checkout `ds_configs/` and `slurm/` are next to it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from lbr_ds.errors import ConfigError, short
from lbr_ds.system.atomic import atomic_folder, try_recover

PACKAGE = Path(__file__).parent.parent
FOLDERS = ("recipes", "ds_configs", "slurm", "examples")


def shipped_folder(name: str) -> Path:
    """Return the path of a shipped folder, one of FOLDERS."""
    inside, beside = PACKAGE / name, PACKAGE.parent / name
    return inside if inside.is_dir() else beside


def find_shipped(kind: str, name: str, suffix: str) -> Path:
    """Return a file by path, or by its bare name among the shipped ones.

    Args:
        kind: the shipped folder, one of FOLDERS.
        name: a path or a bare name.
        suffix: what a bare name lacks, as ".yaml".

    Raises:
        ConfigError: there is no such file; lists the shipped names.
    """
    for path in (Path(name), shipped_folder(kind) / name, shipped_folder(kind) / f"{name}{suffix}"):
        if path.is_file():
            return path
    names = ", ".join(sorted(p.stem for p in shipped_folder(kind).glob(f"*{suffix}")))
    shipped = f"one of the shipped {kind}: {names}"
    raise ConfigError(f"no file {short(name)!r}; give a path, or {shipped}")


def copy_shipped(target: Path) -> list[Path]:
    """Copy recipes, ds_configs, slurm and examples into `target` and return the files.

    Raises:
        ConfigError: one of the folders exists there with other contents.
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
    """Return the contents of all files below a folder, except Python modules' own."""
    return {
        path.relative_to(place): path.read_bytes()
        for path in place.rglob("*")
        if path.is_file() and path.name != "__init__.py" and "__pycache__" not in path.parts
    }
