"""Write the table of keys of torchvision's networks: python -m scripts.torchvision_keys."""

from __future__ import annotations

import json
from importlib.metadata import version

from ttcompress.networks import architectures, known_keys
from ttcompress.records.report import Architecture


def table() -> dict[str, list[known_keys.Keys]]:
    """By network, the keys of every form that its checkpoints come in."""
    found = {}
    for name in architectures.names("torchvision"):
        forms: list[dict[str, int]] = [{}, {"aux_logits": 0}] if name in architectures.WITH_AUX else [{}]
        models = [architectures.build(Architecture("torchvision", name, form)) for form in forms]
        found[name] = [known_keys.keys_of(model.state_dict()) for model in models]
    return found


def main() -> None:
    lines = [f"  {json.dumps(name)}: {json.dumps(forms)}" for name, forms in table().items()]
    text = ",\n".join([f'  "torchvision": {json.dumps(version("torchvision").partition("+")[0])}', *lines])
    known_keys.FILE.write_text(f"{{\n{text}\n}}\n")


if __name__ == "__main__":
    main()
