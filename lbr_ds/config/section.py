"""The base class of every section of a recipe, and the types of keys that hold a path or a URL."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    PlainSerializer,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lbr_ds.system.masking import mask_secrets
from lbr_ds.system.urls import check_url, expand_home, path_or_url, public_url

MAX_COUNT = 2**31 - 1  # the upper bound of counts that have no tighter one


class Section(BaseModel):
    """A section of a recipe: immutable; unknown keys and numbers that are not finite are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _one_name_only(cls, raw: Any) -> Any:
        """Refuse a key that is given under both of its names, as `from` and `start_from`."""
        for name, field in cls.model_fields.items() if isinstance(raw, dict) else ():
            if field.alias and field.alias in raw and name in raw:
                raise ValueError(f"{field.alias} and {name} are the same key; give one of them")
        return raw

    @field_validator("*", mode="before")
    @classmethod
    def _plain_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse a boolean for a key of another type, and a text with a null character."""
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and bool not in {field.annotation, *get_args(field.annotation)}:
            raise ValueError(
                "is a boolean here (YAML also reads on, off, yes and no as booleans), but the key "
                "takes another type; give a value of that type, and put text such as 'on' in quotes"
            )
        if isinstance(value, str) and "\0" in value:
            raise ValueError("holds a null character; remove it")
        return value


# `model_dump_json` writes the resolved recipe. It must hold no passwords, so the types below that
# may be a URL leave them out.
Folder = Annotated[
    Path | str,
    AfterValidator(path_or_url),
    PlainSerializer(public_url, return_type=str, when_used="json"),
]
Address = Annotated[
    str,
    AfterValidator(lambda place: check_url(expand_home(place))),
    PlainSerializer(mask_secrets, return_type=str, when_used="json"),
]
LocalPath = Annotated[Path, AfterValidator(lambda place: Path(expand_home(str(place))))]
NameOrPath = Annotated[str, AfterValidator(expand_home)]  # of a model or a ds_config
