"""A workflow of ComfyUI in its two forms: that of the API, and that of its page (format 0.4)."""

from __future__ import annotations

from typing import Any, NamedTuple

Link = tuple[int, int]
"""An output of a node: its id, and the number of the output."""


class Definition(NamedTuple):
    """What a workflow needs to know of a node.

    Args:
        links: inputs that come from another node: name and type.
        widgets: inputs that are values on the node, in the order of the page.
        outputs: name and type.
    """

    links: dict[str, str]
    widgets: tuple[str, ...]
    outputs: dict[str, str]


_SIZE = ("width", "height", "batch_size")
_CONDITIONINGS = {"positive": "CONDITIONING", "negative": "CONDITIONING"}
NODES = {
    "CheckpointLoaderSimple": Definition({}, ("ckpt_name",), {"MODEL": "MODEL", "CLIP": "CLIP", "VAE": "VAE"}),
    "LoraLoaderModelOnly": Definition({"model": "MODEL"}, ("lora_name", "strength_model"), {"MODEL": "MODEL"}),
    "LoadImage": Definition({}, ("image",), {"IMAGE": "IMAGE", "MASK": "MASK"}),
    "VAEEncode": Definition({"pixels": "IMAGE", "vae": "VAE"}, (), {"LATENT": "LATENT"}),
    "EmptyLatentImage": Definition({}, _SIZE, {"LATENT": "LATENT"}),
    "EmptySD3LatentImage": Definition({}, _SIZE, {"LATENT": "LATENT"}),
    "EmptyFlux2LatentImage": Definition({}, _SIZE, {"LATENT": "LATENT"}),
    "UNETLoader": Definition({}, ("unet_name", "weight_dtype"), {"MODEL": "MODEL"}),
    "VAELoader": Definition({}, ("vae_name",), {"VAE": "VAE"}),
    "CLIPLoader": Definition({}, ("clip_name", "type", "device"), {"CLIP": "CLIP"}),
    "ReferenceLatent": Definition({"conditioning": "CONDITIONING", "latent": "LATENT"}, (), {"CONDITIONING": "CONDITIONING"}),
    "CFGGuider": Definition({"model": "MODEL", **_CONDITIONINGS}, ("cfg",), {"GUIDER": "GUIDER"}),
    "RandomNoise": Definition({}, ("noise_seed",), {"NOISE": "NOISE"}),
    "KSamplerSelect": Definition({}, ("sampler_name",), {"SAMPLER": "SAMPLER"}),
    "Flux2Scheduler": Definition({}, ("steps", "width", "height"), {"SIGMAS": "SIGMAS"}),
    "SplitSigmas": Definition({"sigmas": "SIGMAS"}, ("step",), {"high_sigmas": "SIGMAS", "low_sigmas": "SIGMAS"}),
    "SamplerCustomAdvanced": Definition(
        {"noise": "NOISE", "guider": "GUIDER", "sampler": "SAMPLER", "sigmas": "SIGMAS", "latent_image": "LATENT"},
        (),
        {"output": "LATENT", "denoised_output": "LATENT"},
    ),
    "CLIPTextEncode": Definition({"clip": "CLIP"}, ("text",), {"CONDITIONING": "CONDITIONING"}),
    "ImagicConditioning": Definition({}, ("embeddings", "eta"), _CONDITIONINGS),
    "ImagicEtaBatch": Definition(
        {"latent": "LATENT"}, ("embeddings", "eta_from", "eta_to", "count"), {**_CONDITIONINGS, "latent": "LATENT"}
    ),
    "KSamplerAdvanced": Definition(
        {"model": "MODEL", **_CONDITIONINGS, "latent_image": "LATENT"},
        (
            "add_noise",
            "noise_seed",
            "steps",
            "cfg",
            "sampler_name",
            "scheduler",
            "start_at_step",
            "end_at_step",
            "return_with_leftover_noise",
        ),
        {"LATENT": "LATENT"},
    ),
    "VAEDecode": Definition({"samples": "LATENT", "vae": "VAE"}, (), {"IMAGE": "IMAGE"}),
    "SaveImage": Definition({"images": "IMAGE"}, ("filename_prefix",), {}),
}
"""The nodes that a workflow of ours uses: those of ComfyUI itself, and those of ``data/imagic_nodes.py``."""

_ADDED_BY_THE_PAGE = {"noise_seed": "fixed", "image": "image"}  # values that the page keeps after these: what follows a seed, an upload
_WIDTH, _HEIGHT, _COLUMNS = 340, 320, 4  # of a node's place on the page, in pixels


class Graph:
    """A workflow, built node by node."""

    def __init__(self) -> None:
        self.nodes: list[tuple[str, dict[str, Any]]] = []

    def add(self, kind: str, **inputs: Any) -> int:
        """Adds a node and returns its id, which counts from 1.

        Args:
            kind: the class of the node, one of :data:`NODES`.
            inputs: a value for every widget, and a :data:`Link` for every input that is linked.
        """
        self.nodes.append((kind, inputs))
        return len(self.nodes)

    def api(self) -> dict[str, Any]:
        """The form that ``POST /prompt`` takes as ``prompt``."""

        def value(given: Any) -> Any:
            return [str(given[0]), given[1]] if isinstance(given, tuple) else given

        return {
            str(k): {"class_type": kind, "inputs": {name: value(given) for name, given in inputs.items()}}
            for k, (kind, inputs) in enumerate(self.nodes, 1)
        }

    def ui(self) -> dict[str, Any]:
        """The form that the page opens: nodes with their places, and a list of links."""
        links: list[list[Any]] = []
        for k, (kind, inputs) in enumerate(self.nodes, 1):
            for slot, (name, type_name) in enumerate(NODES[kind].links.items()):
                links.append([len(links) + 1, *inputs[name], k, slot, type_name])
        return {
            "last_node_id": len(self.nodes),
            "last_link_id": len(links),
            "nodes": [self._node(k, links) for k in range(1, len(self.nodes) + 1)],
            "links": links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }

    def _node(self, k: int, links: list[list[Any]]) -> dict[str, Any]:
        kind, inputs = self.nodes[k - 1]
        defined = NODES[kind]
        widgets: list[Any] = []
        for name in defined.widgets:
            widgets += [inputs[name], *([_ADDED_BY_THE_PAGE[name]] if name in _ADDED_BY_THE_PAGE else [])]
        incoming = {link[4]: link[0] for link in links if link[3] == k}
        outgoing = [[link[0] for link in links if link[1:3] == [k, slot]] for slot in range(len(defined.outputs))]
        named, outputs = enumerate(defined.links.items()), enumerate(defined.outputs.items())
        return {
            "id": k,
            "type": kind,
            "pos": [40 + _WIDTH * ((k - 1) % _COLUMNS), 60 + _HEIGHT * ((k - 1) // _COLUMNS)],
            "size": [_WIDTH - 40, 60 + 26 * max(len(defined.links) + len(widgets), len(defined.outputs))],
            "flags": {},
            "order": k - 1,
            "mode": 0,
            "inputs": [{"name": name, "type": type_name, "link": incoming[slot]} for slot, (name, type_name) in named],
            "outputs": [
                {"name": name, "type": type_name, "links": outgoing[slot], "slot_index": slot} for slot, (name, type_name) in outputs
            ],
            "properties": {"Node name for S&R": kind},
            "widgets_values": widgets,
        }
