"""The options of one run with every default filled in: made once, at the edge, from the recipe that states some."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ttcompress.options import RUN_OPTIONS
from ttcompress.recipe import Recipe


@dataclass(frozen=True)
class Settings:
    """What a run does where it asks for a value; what the user stated is `recipe`.

    An option without a default is None or () where nobody states it, and so is one whose default hangs on what is not
    known before the data or the device is: `augment` and `channels_last`.
    """

    recipe: Recipe
    key: str
    format: str
    rank_multiple: int | str
    any_time: bool
    exec: str
    tune: bool
    input_size: tuple[int, ...]
    calib_images: int
    effort: str
    outputs: tuple[str, ...]
    epochs: int
    optimizer: str
    lr: float
    schedule: str
    warm_up: float
    weight_decay: float
    clip: float
    ema: float
    label_smoothing: float
    distill: float
    temperature: float
    augment: str | None
    mixup: float
    cutmix: float
    precision: str
    channels_last: bool | None
    compile: bool
    accumulate: int
    deterministic: bool
    from_scratch: bool
    device: str
    batch_size: int
    workers: int
    seed: int

    @classmethod
    def of(cls, recipe: Recipe) -> Settings:
        """Fill in the table's defaults, in its order: some hang on options before them.

        >>> Settings.of(Recipe(epochs=1, optimizer="adamw")).lr
        0.001
        """
        values: dict[str, Any] = {}
        for name, option in RUN_OPTIONS.items():
            stated = getattr(recipe, name)
            is_stated = stated is not None and stated != ()
            values[name] = stated if is_stated else option.default_after(values)

        own = {field.name for field in fields(cls)} - {"recipe"}
        # An empty tuple stands for a list that nobody states.
        return cls(
            recipe, **{name: getattr(recipe, name) if values[name] is None else values[name] for name in own}
        )
