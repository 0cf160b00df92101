"""Methods for flows alone, and ``--start flow``: identities, closed forms, predicted passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import PROMPT, array, each, opened, tiny_config
from PIL import Image
from tiny import save_tiny, save_tiny_klein, save_tiny_sd3
from torch import Tensor

from imagic_lora.adapters.adapter import Adapter
from imagic_lora.adapters.contents import read_canvas
from imagic_lora.adapters.store import Store
from imagic_lora.bases.base import Base
from imagic_lora.core.config import EditConfig
from imagic_lora.core.errors import ImagicError
from imagic_lora.core.settings.resolve import resolve
from imagic_lora.methods.flows.flowedit import FlowEdit, FlowEditConfig
from imagic_lora.methods.flows.rf_inversion import RFInversion, RFInversionConfig
from imagic_lora.methods.generated import generation_passes
from imagic_lora.methods.method import Context, EditRequest, metered
from imagic_lora.methods.sampled import EncodedRequest, encode_request
from imagic_lora.methods.sdedit import SDEdit, SDEditConfig
from imagic_lora.photos.canvas import to_image
from imagic_lora.sampling.editor import Editor
from imagic_lora.sampling.flow_trajectory import FlowTrajectory
from imagic_lora.sampling.generate import generate
from imagic_lora.training.fit import fit, result

PHOTO = Image.radial_gradient("L").resize((50, 37)).convert("RGB")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny base of each flow family."""
    root = tmp_path_factory.mktemp("flows")
    return {"sd3": save_tiny_sd3(root / "sd3"), "klein": save_tiny_klein(root / "klein")}


@pytest.fixture(scope="module")
def sd3(places: dict[str, Path]) -> Base:
    return opened(places["sd3"])


@pytest.fixture(scope="module")
def adapters(places: dict[str, Path], photo_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    """An adapter of each base."""
    store, made = Store(tmp_path_factory.mktemp("store")), {}
    for name, place in places.items():
        config = tiny_config(place, "lora", tune={"targets": "attention"}, resolution=32)
        made[name] = result(fit(photo_file, PROMPT, config, store, name))
    return made


def request(target: str = "a dog", source: str | None = "a cat") -> EditRequest:
    return EditRequest(PHOTO, target, source)


def edited(base: Base, method: Any, config: Any, target: str = "a dog") -> np.ndarray:
    """The image of one row."""
    (found,) = method({"row": config}).edit(Context(base), request(target))
    return array(found.image)


def photo_through_vae(base: Base) -> np.ndarray:
    encoded = encode_request(base, request(), 1)
    return array(encoded.image(encoded.clean))


# FlowEdit


def test_equal_prompts_and_scales_give_the_photo(sd3: Base) -> None:
    """Exactly; another prompt, another scale and another strength do not."""
    same = {"steps": 4, "guidance_scale": 3.0, "source_guidance_scale": 3.0}
    kept = edited(sd3, FlowEdit, FlowEditConfig(**same), "a cat")
    assert (kept == photo_through_vae(sd3)).all()
    others: list[tuple[Any, str]] = [({}, "a dog"), ({"source_guidance_scale": 1.0}, "a cat"), ({"strength": 1.0}, "a dog")]
    images = [edited(sd3, FlowEdit, FlowEditConfig(**(same | change)), target) for change, target in others]
    assert all((image != kept).any() for image in images)
    assert (images[0] != images[2]).any()


def test_all_steps_as_last_steps_are_sdedit(sd3: Base) -> None:
    """With the same noise: SDEdit from the same level, which is that of diffusers."""
    found = edited(sd3, FlowEdit, FlowEditConfig(steps=6, guidance_scale=3.0, strength=0.5, last_steps=3))
    expected = edited(sd3, SDEdit, SDEditConfig(steps=6, guidance_scale=3.0, strength=0.5))
    assert np.abs(found - expected).max() <= 1


def toy(sd3: Base, monkeypatch: pytest.MonkeyPatch, goals: dict[str, float]) -> EncodedRequest:
    """A request on a flow whose images of a prompt are one constant: the velocity is known in closed form."""
    encoded = encode_request(sd3, request(), 1)
    named = {id(encoded.target): goals["target"], id(encoded.source): goals["source"], id(encoded.null): 0.0}

    def predict(x_t: Tensor, timesteps: Tensor, conditioning: Any) -> Tensor:
        return (x_t - named[id(conditioning)]) / timesteps.view(-1, 1, 1, 1)

    monkeypatch.setattr(sd3, "predict", predict)
    return encoded


@each("average, strength, scale", [(1, 1.0, 1.0), (3, 0.5, 1.0), (1, 1.0, 2.0)])
def test_the_edit_moves_by_the_difference_of_the_prompts(
    sd3: Base, monkeypatch: pytest.MonkeyPatch, average: int, strength: float, scale: float
) -> None:
    """In closed form: images of target and source prompt differ by a constant, which is what is added to the photo."""
    encoded = toy(sd3, monkeypatch, {"target": 2.0, "source": 0.5})
    config = FlowEditConfig(steps=8, guidance_scale=scale, source_guidance_scale=1, strength=strength, average=average)
    trajectory = FlowTrajectory(sd3, 8, 64)
    found = FlowEdit().edited(encoded, config, trajectory)
    torch.testing.assert_close(found, encoded.clean + scale * 2.0 - 0.5, atol=1e-4, rtol=0)


# RF-Inversion


def test_the_pulls_lead_to_noise_and_to_the_photo(sd3: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pull of 1 is exact; without pulls the photo is inverted and sampled with the target prompt."""
    encoded = encode_request(sd3, request(), 3)
    trajectory = FlowTrajectory(sd3, 6, 64)
    back = RFInversion().edited(encoded, RFInversionConfig(steps=6, pull=1, stop=1), trajectory)
    torch.testing.assert_close(back, encoded.clean, atol=1e-4, rtol=0)
    assert encoded.null is not None
    free = edited(sd3, RFInversion, RFInversionConfig(steps=6, guidance_scale=3, gamma=0, pull=0))
    config = EditConfig(steps=6, guidance_scale=3, start="inverted")
    (expected,) = generate(sd3, [encoded.target], [0], config, encoded.canvas, encoded.null, [encoded.null])
    assert np.abs(free - array(expected)).max() <= 1
    seen: list[Tensor] = []
    walk = FlowTrajectory.forwards
    monkeypatch.setattr(FlowTrajectory, "forwards", lambda self, latents, *rest: seen.append(latents) or walk(self, latents, *rest))
    RFInversion().edited(encoded, RFInversionConfig(steps=6, gamma=1), trajectory)
    torch.testing.assert_close(seen[0], encoded.noise(), atol=1e-4, rtol=0)


# Both


@each(
    "method, config",
    [
        (FlowEdit, FlowEditConfig(steps=6)),
        (FlowEdit, FlowEditConfig(steps=6, average=2, last_steps=2, source_guidance_scale=1, strength=1)),
        (RFInversion, RFInversionConfig(steps=3)),
        (RFInversion, RFInversionConfig(steps=3, guidance_scale=1)),
    ],
)
def test_passes_are_those_predicted(sd3: Base, method: Any, config: Any) -> None:
    """Also of klein's base; U-Nets, distilled bases and a missing source prompt are refused by name."""
    one = method({"row": config})
    (found,) = one.edit(Context(sd3), request())
    assert found.cost.forward == one.passes(sd3)["row"].forward


def test_other_bases_are_refused_by_name(places: dict[str, Path], tmp_path: Path, sd3: Base) -> None:
    """Before anything is computed."""
    with pytest.raises(ImagicError, match=r"method flowedit on .*a unet. Expected: a transformer"):
        next(FlowEdit().edit(Context(opened(save_tiny(tmp_path / "sd"))), request()))
    with pytest.raises(ImagicError, match=r"method rf-inversion on .*classifier-free guidance"):
        next(RFInversion().edit(Context(opened(save_tiny_klein(tmp_path / "fast", distilled=True))), request()))
    with pytest.raises(ImagicError, match="method flowedit without a source prompt"):
        next(FlowEdit().edit(Context(sd3), request(source=None)))
    assert edited(opened(places["klein"]), FlowEdit, FlowEditConfig(steps=2)).shape == (37, 50, 3)


# --start flow


@each("name", ["sd3", "klein"])
def test_an_edit_starts_from_the_photo_itself(places: dict[str, Path], adapters: dict[str, Adapter], name: str) -> None:
    """Eta 0 is exactly the photo through the VAE, whatever the seed; a higher eta, seed and strength change it."""
    base, adapter = opened(places[name]), adapters[name]
    config = EditConfig(steps=4, guidance_scale=3.0, start="flow", strength=0.75)
    canvas = read_canvas(adapter)
    (pixels,) = base.decode(base.encode_image(canvas.pixels)).clamp(-1, 1)
    photo = array(canvas.restored(to_image(pixels)))
    editor = Editor(base)
    images = {(one.eta, one.seed): array(one.image) for one in editor.edit(adapter, [0.0, 1.0], [0, 1], config)}
    assert (images[0.0, 0] == photo).all()
    assert (images[0.0, 1] == photo).all()
    assert (images[1.0, 0] != photo).any()
    assert (images[1.0, 0] != images[1.0, 1]).any()
    (alone,) = editor.edit(adapter, [1.0], [0], config)
    assert np.abs(array(alone.image) - images[1.0, 0]).max() <= 1
    (less,) = editor.edit(adapter, [1.0], [0], config.model_copy(update={"strength": 0.25}))
    assert (array(less.image) != images[1.0, 0]).any()


def test_the_source_is_the_optimised_embedding(places: dict[str, Path], adapters: dict[str, Adapter]) -> None:
    """Or another eta: at its own eta an edit is the photo."""
    editor, adapter = Editor(opened(places["sd3"])), adapters["sd3"]
    config = EditConfig(steps=4, guidance_scale=3.0, start="flow", source_eta=0.5)
    below, at, above = (array(one.image) for one in editor.edit(adapter, [0.2, 0.5, 1.0], [0], config))
    assert (below == at).all()
    assert (at != above).any()


def test_its_passes_are_predicted(sd3: Base) -> None:
    """Two velocities a step, each guided."""
    encoded = encode_request(sd3, request(), 3)
    for config in (EditConfig(steps=4, guidance_scale=3, start="flow"), EditConfig(steps=4, guidance_scale=1, start="flow", strength=0.5)):
        with metered(sd3) as meter:
            list(generate(sd3, [encoded.target], [0], config, encoded.canvas, encoded.null, [encoded.null or encoded.target]))
        assert meter.forward == generation_passes(sd3, config).forward


@each(
    "flags, message",
    [({"ddim_eta": 1.0}, "--ddim-eta.*--start flow"), ({"start": "noise", "strength": 0.5}, "only with --start image or flow")],
)
def test_settings_that_start_flow_does_not_read_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ImagicError, match=message):
        resolve({"edit": {"start": "flow"} | flags}, {}, {})


def test_a_diffusion_has_no_start_flow(tmp_path: Path, photo_file: Path) -> None:
    """And the strength must leave a step."""
    base = opened(save_tiny(tmp_path / "sd"))
    adapter = result(fit(photo_file, PROMPT, tiny_config(tmp_path / "sd"), Store(tmp_path / "store"), "one"))
    assert adapter is not None
    with pytest.raises(ImagicError, match=r"start flow on .*a diffusion. Expected: a flow"):
        next(Editor(base).edit(adapter, [0.5], [0], EditConfig(steps=4, start="flow")))
    with pytest.raises(ImagicError, match=r"strength 0\.1 with 4 steps"):
        next(Editor(base).edit(adapter, [0.5], [0], EditConfig(steps=4, start="flow", strength=0.1)))
