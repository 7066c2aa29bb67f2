"""Make a model's shape with transformers' own class: `python -m mirage_ds.model.describe NAME` < config.json."""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

from mirage_ds.errors import EXIT_USER_ERROR, UserError, reason
from mirage_ds.model.family import family_of
from mirage_ds.model.load import shape_of


def described(values: dict[str, Any], where: str) -> str:
    """Return the Shape of a configuration as JSON.

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
    return json.dumps(shape_of(config, where))


if __name__ == "__main__":
    try:
        sys.stdout.write(described(json.load(sys.stdin), sys.argv[1]))
    except UserError as error:
        sys.stderr.write(f"\n{error}\n")
        sys.exit(EXIT_USER_ERROR)
