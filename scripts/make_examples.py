"""Fits the two example adapters in ``adapters/`` with the defaults: ``python scripts/make_examples.py``.

The scenes and the eta of each were chosen by eye.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from diffusers.utils import logging

from imagic_lora.adapters.store import Store
from imagic_lora.core.settings.recipes import RECIPES
from imagic_lora.core.settings.resolve import resolve
from imagic_lora.critters import render, scene_at
from imagic_lora.training.fit import fit, open_base, result

STORE = Path(__file__).parent.parent / "adapters"
EXAMPLES = {  # demo scene, target prompt, eta
    "rex-jumps": (105, "a dog jumping", 1.0),
    "mia-wears-a-hat": (98, "a cat wearing a hat", 0.8),
}


def main() -> None:
    logging.disable_progress_bar()
    base = open_base(resolve({"base": "critters"}, {}, RECIPES["critters"]))
    with tempfile.TemporaryDirectory() as folder:
        for name, (index, prompt, eta) in EXAMPLES.items():
            photo = Path(folder) / f"{name}.png"
            render(scene_at("demo", index)).save(photo)
            config = resolve({"base": "critters", "eta": eta}, {}, RECIPES["critters"])
            adapter = result(fit(photo, prompt, config, Store(STORE), name, base=base, overwrite=True))
            assert adapter is not None
            print(f"{adapter.folder.name}: {adapter.size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
