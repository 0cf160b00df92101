"""compare with DreamBooth and textual inversion: predicted before, counted after, left out with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from common import Run, each, loaded, read_comparison
from PIL import Image
from tiny import save_tiny_sd3

from imagic_lora.adapters.store import Store
from imagic_lora.core.settings.merging import merged
from imagic_lora.core.settings.recipes import RECIPES
from imagic_lora.core.settings.resolve import resolve
from imagic_lora.memory.out_of_memory import assumed_from
from imagic_lora.memory.prediction import predict
from imagic_lora.methods.comparison.candidates import GROUPS, class_of
from imagic_lora.sampling.editor import Editor
from imagic_lora.training import prior
from imagic_lora.training.fit import fit, result

METHODS = ("dreambooth", "textual-inversion")
SETTINGS = {
    "dreambooth": {
        "tune": {"steps": 2, "rank": 2}, "edit": {"steps": 2, "guidance_scale": 3.0}, "dreambooth": {"class_pictures": 2},
    },
    "textual-inversion": {
        "embed": {"steps": 2, "learning_rate": 0.1}, "edit": {"steps": 2, "guidance_scale": 3.0},
        "inversion": {"vectors": 2, "templates": "prompt"},
    },
}  # fmt: skip


def flags(settings: dict, group: str = "") -> list[str]:
    """The settings as flags ``--set``."""
    found = []
    for name, value in settings.items():
        found += flags(value, f"{group}{name}.") if isinstance(value, dict) else ["--set", f"{group}{name}={value}"]
    return found


@pytest.mark.slow
@each(
    "name, noun, prompts",
    [("dreambooth", "cat", ("a sks cat", "a red sks cat")), ("textual-inversion", "c", ("a <subject>", "a red <subject>"))],
)
def test_what_is_predicted_is_what_it_takes(
    run: Run, folder: Path, photo_file: Path, tmp_path: Path, monkeypatch, name: str, noun: str, prompts: tuple[str, str]
) -> None:
    """Passes, those of class pictures apart, which a second comparison does not make again; the peak is that of the fit.

    The image is that of the library's own fit and edit, where the word takes the place of the noun in the target prompt.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    head = ("compare", photo_file, f"a red {noun}", "--base", folder, "--device", "cpu", "--subject", noun, "--methods", name, "--seed", 3)
    command = [*head, *flags(SETTINGS[name])]
    code, _, err = run(*command, "--out", f"first-{name}")
    assert code == 0, err
    first = read_comparison(f"first-{name}")[name]
    predicted, cost = first["predicted"], first["cost"]
    assert (predicted["passes"]["forward"], predicted["passes"]["backward"]) == (cost["forward"], cost["backward"])
    once = 2 * 2 * 2 if name == "dreambooth" else None  # class pictures, steps, guidance
    assert predicted.get("once") == once
    assert ("class pictures" in err) == (once is not None)
    assert json.loads(Path(f"first-{name}/results.json").read_text())["subject"] == noun
    named = {"dreambooth": {"class_prompt": f"a {noun}"}} if name == "dreambooth" else {"inversion": {"initial_word": noun}}
    given = merged(SETTINGS[name], named, {"seed": 3, "monitoring": {"convergence_every": 0}})
    config = resolve({"base": str(folder), "method": name, "memory": {"device": "cpu"}}, given, RECIPES["sd"])
    base = loaded(folder)
    plan = predict(base.architecture, config.model_copy(update={"memory": base.runtime.memory}), assumed_from(base.runtime))
    assert predicted["peak_bytes"] == plan.peak_bytes
    adapter = result(fit(photo_file, prompts[0], config, Store(tmp_path / "store"), "one", base=base))
    assert adapter is not None
    (expected,) = Editor(base).edit(adapter, [1.0], [3], config.edit, prompts[1])
    assert np.array_equal(np.asarray(Image.open(f"first-{name}/{name}.png")), np.asarray(expected.image))
    monkeypatch.setattr(prior, "generate", lambda _, wanted, *__: pytest.fail("class pictures are made again") if wanted else iter(()))
    code, _, err = run(*command, "--out", f"second-{name}")
    assert code == 0, err
    assert "once" not in read_comparison(f"second-{name}")[name]["predicted"]


def test_they_are_left_out_of_groups_for_a_reason(run: Run, folder: Path, photo_file: Path, tmp_path: Path) -> None:
    """fast has no method with a fit; all has them, for a subject; a flow is refused by name."""
    assert not set(METHODS) & set(GROUPS["fast"])
    assert set(METHODS) <= set(GROUPS["all"])
    assert [class_of(name).requires for name in METHODS] == [{"subject"}] * 2
    flow = save_tiny_sd3(tmp_path / "flow")
    command = ("compare", photo_file, "a red cat", "--base", flow, "--device", "cpu", "--subject", "cat", "--methods")
    for name in METHODS:
        code, _, err = run(*command, name)
        assert code == 2
        assert f"method {name} on" in err
        assert "a transformer" in err
    code, out, _ = run("methods", "--json")
    rows = {row["name"]: row for row in json.loads(out)["methods"]}
    assert all((rows[name]["needs"], rows[name]["fast"]) == (["subject"], False) for name in METHODS)
    assert run("methods", "dreambooth")[1].startswith("DreamBooth (arXiv 2208.12242), as LoRA")
