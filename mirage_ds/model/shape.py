"""The parameters of a model by name and size, without their values; needs no torch."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """A model as transformers' own class makes it (model.load.shape_of).

    Attributes:
        config: its configuration, with all that config.json leaves out.
        shapes: name (model.load.public_name) → shape of each parameter, in the model's order; a tied head has none.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, Sequence[int]]

    def elements(self, start: str, matrices: bool | None = None) -> list[int]:
        """List the elements of the parameters whose name begins so; of the matrices, or of the others, alone."""
        return [
            math.prod(shape)
            for name, shape in self.shapes.items()
            if name.startswith(start) and matrices in (None, len(shape) > 1)
        ]

    def layers(self, start: str) -> int:
        """Count the layers of a stack, such as "model.layers."."""
        return len({name.removeprefix(start).split(".")[0] for name in self.shapes if name.startswith(start)})
