"""Make a model's shape from a config.json with transformers' own class."""

from __future__ import annotations

import copy
import json
from typing import Any

from mirage_ds.errors import UserError, reason
from mirage_ds.model.family import family_of
from mirage_ds.model.load import shape_of
from mirage_ds.model.shape import Shape


def described(values: dict[str, Any], where: str) -> Shape:
    """Return the Shape of a configuration.

    Args:
        values: what a config.json holds; where: how it is called in messages.

    Raises:
        UserError: transformers makes no model of it.
    """
    family = family_of(values.get("model_type"), where)
    try:
        config = family.config_class().from_dict(copy.deepcopy(values))
    except Exception as error:  # noqa: BLE001  # a value of a wrong type leads transformers to almost any
        raise UserError(f"{where}: no {family.title} ({reason(error)}); copy the model's own config.json") from None
    # As it is read back from a cache: with lists for tuples.
    return Shape(*json.loads(json.dumps(shape_of(config, where))))
