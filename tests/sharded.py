"""Sharded checkpoints, written without our code."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

INDEX = "x.safetensors.index.json"


def write(folder: Path, tensors: dict[str, Tensor], homes: dict[str, str]) -> Path:
    """The folder, with each tensor in the shard that `homes` names, and their index."""
    folder.mkdir(exist_ok=True)
    for shard in set(homes.values()):
        save_file(
            {name: tensors[name] for name in homes if homes[name] == shard}, folder / shard, {"format": "pt"}
        )
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": homes}))
    return folder
