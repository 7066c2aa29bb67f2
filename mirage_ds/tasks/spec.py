"""The settings of a build from boards; each becomes a command-line flag."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from mirage_ds.tasks.maps import Ties
from mirage_ds.tasks.task import Settings

_RANDOM_ONLY = ("levels", "proportions", "hole_rate", "split")


class BuildSpec(Settings):
    """What to build."""

    maps: Path | None = Field(None, description="JSONL file with map_desc to take the boards from; else random boards")
    count: int | None = Field(None, ge=1, description="rows to make [default: 1000, or every row of --maps]")
    levels: list[int] = Field([3, 4, 5, 6], description="sides of the random boards, 3 to 8")
    proportions: list[float] | None = Field(
        None, description="shares of the levels [default: side - 2, the paper's 1:2:3:4 for levels 3 to 6]"
    )
    hole_rate: float = Field(0.2, ge=0, le=0.5, description="greatest share of holes on a random board")
    split: Literal["train", "dev", "test"] = Field(
        "train", description="which of three sets of random boards, disjoint up to symmetry whatever the seed"
    )
    seed: int = Field(0, description="the same seed gives the same bytes")
    exclude: list[Path] = Field(
        [], description="maps to leave out with their rotations and reflections: JSONL with map_desc, or SHA-256 list"
    )
    drop_duplicates: bool = Field(False, description="with --maps: leave out rows that repeat map and answer")
    answer: Literal["direct", "cot"] = Field(
        "direct", description="the boxed answer alone, or a rationale by rule around the helper image"
    )
    prompt: Literal["full", "short"] = Field("full", description="the public prompt, or one short sentence")
    ties: Ties = Field("rule", description="which of several shortest paths: by a fixed order of moves, or at random")
    cell_size: int = Field(64, ge=8, le=256, description="px a cell; at 64 the pictures are the benchmark's")

    @model_validator(mode="after")
    def _fits_together(self) -> BuildSpec:
        if self.maps is not None:
            for name in _RANDOM_ONLY:
                if name in self.model_fields_set:
                    raise ValueError(
                        f"--{name} is about random boards and cannot go with --maps; leave one of them out"
                    )
            return self
        if self.drop_duplicates:
            raise ValueError("--drop_duplicates goes with --maps; random boards never repeat")
        if not self.levels or len(set(self.levels)) != len(self.levels) or not all(3 <= x <= 8 for x in self.levels):
            raise ValueError(f"--levels is {self.levels}; give different sides from 3 to 8")
        shares = self.shares()
        if len(shares) != len(self.levels) or min(shares) < 0 or sum(shares) <= 0:
            raise ValueError(
                f"--proportions is {self.proportions}; give one share per level, {len(self.levels)} in all"
            )
        return self

    def shares(self) -> list[float]:
        """Return one share per level."""
        return self.proportions if self.proportions is not None else [level - 2.0 for level in self.levels]


class ReadingSpec(BuildSpec):
    """What to build of a task whose answer is read off the picture: no helper, so no rationale around one."""

    answer: Literal["direct"] = Field("direct", description="the boxed answer alone")
    prompt: Literal["full", "short"] = Field("short", description="one short sentence, or a longer explanation")
