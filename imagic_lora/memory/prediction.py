"""Predicts the peak memory of every stage of a run. No torch here: the prediction takes milliseconds."""

from __future__ import annotations

from dataclasses import asdict, replace
from math import ceil, prod
from typing import Literal

from ..bases.architecture import Architecture, UNetArchitecture
from ..bases.layers import text_parameters
from ..core.config import RunConfig
from .plan import Assumed, Peak, Plan, assume, denoiser_waits_in_host_memory, sampled_at_once
from .rehearsed import recall
from .symbolic.layers import LayerOptions, Layers, NotPlanned
from .symbolic.tape import Tape
from .symbolic.unet import UNet
from .symbolic.vae import vae_forward
from .trained import CountedWeights, Counts, trained, word_trained

_ITEMSIZES = {"fp32": 4, "fp16": 2, "bf16": 2}
_CUDA_CONTEXT = 500 * 2**20  # bytes of a CUDA context and the kernels of its libraries, before any tensor exists
_LIBRARIES = 700 * 2**20  # bytes of Python, PyTorch and diffusers in host memory
_ROUNDING = 8  # bytes an element: stochastic rounding updates bf16 weights on fp32 copies of weight and gradient
_STORED_EMBEDDINGS = 3  # target, optimised, unconditional; each stored in fp32
_STORED_VECTORS = 2  # in the input space: target, optimised; each stored in fp32


def predict(architecture: Architecture, run: RunConfig, assumed: Assumed | None = None, photos: int = 1, edit: bool = False) -> Plan:
    """Predicts the memory of a run from symbolic forward and backward passes of its models, or from an earlier rehearsal.

    Args:
        architecture: configs of the base's components, from :func:`~imagic_lora.bases.loading.registry.architecture_of`.
        run: settings of the run.
        assumed: device, precision and optimizer; None for those of the run, where ``auto`` counts as a card with bf16.
        photos: number of photos that are fitted together, in one batch; the adapter and the checkpoint are those of one. A rehearsal
            counts one photo, and all of it but the base is multiplied: on U-Nets that is what a plan of several counts, or a little more.
        edit: whether the stages of an edit are enough.

    Raises:
        NotPlanned: the denoiser is a transformer that was not rehearsed with these settings, or has parts that
            :mod:`imagic_lora.memory.symbolic.unet` does not model.
    """
    assumed = assumed or assume(run)
    if isinstance(architecture, UNetArchitecture):
        planner = _Planner(architecture, run, assumed, photos=photos)
        return planner.plan(planner.stages())
    rehearsed = recall(architecture, run, asdict(assumed), edit)
    if rehearsed is None:
        remedy = "run imagic-lora plan with the same settings, which rehearses the fit, or choose a --preset"
        raise NotPlanned("a transformer", "a U-Net, or a transformer that was rehearsed with these settings", remedy)
    counts = CountedWeights(**rehearsed.counts)
    added = (photos - 1) * trained(architecture, run.tune.mode, counts, assumed.optimizer).added
    # photos are encoded, and previews decoded, one after another
    batches = {"embed": photos, "tune": photos, "sample": ceil(photos / sampled_at_once(architecture, run))}
    stages = {
        name: Peak(*sizes).times(batches.get(name, 1), 0 if name in ("encode", "embed") else added)
        for name, sizes in rehearsed.stages.items()
    }
    return plan_from_peaks(architecture, run, assumed, stages, counts)


def plan_from_peaks(
    architecture: Architecture, run: RunConfig, assumed: Assumed, stages: dict[str, Peak], counts: Counts | None = None
) -> Plan:
    """A plan with given peaks; host memory and sizes on disk are predicted.

    Args:
        architecture: configs of the base's components.
        run: settings of the run.
        assumed: device, precision and optimizer that the peaks are for.
        stages: the peak of every stage, by name.
        counts: of the denoiser; None counts a symbolic U-Net.

    Raises:
        NotPlanned: as :func:`predict`, without ``counts``.
    """
    return _Planner(architecture, run, assumed, counts).plan(stages)


class _Planner:
    """Predicts the peak of each stage of a run."""

    def __init__(self, architecture: Architecture, run: RunConfig, assumed: Assumed, counts: Counts | None = None, photos: int = 1) -> None:
        self.architecture, self.run, self.assumed, self.photos = architecture, run, assumed, photos
        self.full = run.tune.mode == "full"
        self.itemsize = _ITEMSIZES[assumed.dtype]
        self.pixels = (run.resolution or architecture.resolution) ** 2
        self.unet = counts or self._denoiser_pass(tuned=True)[0]
        self.vae = self._vae_pass(decode=True)[0] + self._vae_pass(decode=False)[0]
        texts = architecture.text_encoders.items()
        kinds = architecture.encoder_classes
        self.encoders = self.vae + self.itemsize * sum(text_parameters(config, kinds[name]) for name, config in texts)
        self.trained = trained(architecture, run.tune.mode, self.unet, assumed.optimizer)
        if run.method == "textual-inversion":
            self.trained = word_trained(architecture, run.inversion.vectors, assumed.optimizer)

    def plan(self, stages: dict[str, Peak]) -> Plan:
        """The plan with these peaks."""
        embeddings = _STORED_EMBEDDINGS * 4 * sum(prod(shape) for shape in self.architecture.conditioning.values())
        if self.run.embed.space == "input":
            embeddings += _STORED_VECTORS * 4 * sum(prod(shape) for shape in self.architecture.vectors.values())
        cuda = self.assumed.device == "cuda"
        return Plan(
            self.assumed,
            stages,
            context=_CUDA_CONTEXT if cuda else _LIBRARIES,
            host=_LIBRARIES + (self.unet.bytes + self.encoders if cuda else max(peak.total for peak in stages.values())),
            adapter=self.trained.stored + embeddings,
            checkpoint=self.trained.weights + self.trained.states + embeddings,
        )

    def stages(self) -> dict[str, Peak]:
        """The peak of every stage."""
        run, unet = self.run, self.unet
        keeps_encoders = run.memory.idle == "keep"
        training = unet.bytes + (self.encoders if keeps_encoders else 0)
        tuned = training + self.photos * self.trained.added
        sampling = tuned + (0 if keeps_encoders else self.vae)
        encoding = self.encoders + (0 if denoiser_waits_in_host_memory(run, self.assumed) else unet.bytes)
        batch = sampled_at_once(self.architecture, run)
        if self.photos > 1:  # their previews are sampled together, in batches as large as those of the last stage
            batch = max(batch, self.photos * list(run.stages.values())[-1].batch_size)
        sample = Peak(sampling, 0, 0, self._denoiser_pass(tuned=True, batch=batch)[1])
        decode = Peak(sampling, 0, 0, self._vae_pass(decode=True, images=run.edit.batch_size)[1])
        preview = Peak(sampling, 0, self.photos * self.trained.states, max(sample.activations, decode.activations))
        embed = Peak(training, 0, 0, self._denoiser_pass(batch=self.photos * run.embed.batch_size, trains="embed")[1])
        if run.encodes_while_training:  # the encoders stay until the end of the stage, and their activations until the backward pass
            embed = replace(
                embed, weights=unet.bytes + self.encoders, activations=embed.activations + self.photos * self._text_activations()
            )
        return {
            "encode": Peak(encoding, 0, 0, self._vae_pass(decode=False)[1]),
            **({"class": replace(sample, weights=training + sampling - tuned, activations=preview.activations)} if run.prior else {}),
            **({"embed": embed} if "embed" in run.stages else {}),
            **({"tune": self._tune(tuned)} if "tune" in run.stages else {}),
            **({"preview": preview} if run.previews_every else {}),
            "sample": sample,
            "decode": decode,
        }

    def _text_activations(self) -> int:
        """Bytes that the CLIP text encoders keep for their backward pass.

        A layer keeps six tensors of its width (inputs of both norms, queries, keys, values and what attends), and one or, for quick_gelu,
        two of its inner width: within 5% of a rehearsal for Stable Diffusion 1.5 and SDXL.
        """
        elements = 0
        for name, config in self.architecture.text_encoders.items():
            _, length, width = self.architecture.vectors[name]
            inner = config["intermediate_size"] * (2 if config.get("hidden_act", "quick_gelu") == "quick_gelu" else 1)
            elements += config["num_hidden_layers"] * length * (6 * width + inner)
        return self.itemsize * elements

    def _tune(self, weights: int) -> Peak:
        held = self._denoiser_pass(tuned=True, batch=self.photos * (1 + self.run.prior) * self.run.tune.batch_size, trains="tune")[1]
        gradients = 0 if self.run.memory.optimizer_in_backward else self.photos * self.trained.weights
        return Peak(weights, gradients, self.photos * self.trained.states, max(held, gradients) - gradients)

    def _denoiser_pass(self, tuned: bool = False, batch: int = 1, trains: Literal["embed", "tune"] | None = None) -> tuple[Layers, int]:
        """Runs the symbolic denoiser once.

        Args:
            tuned: the denoiser has LoRA layers, or is trained itself.
            batch: number of samples.
            trains: the stage that the backward pass belongs to; None for a forward pass alone.

        Returns:
            The layers with their counts, and the peak in bytes of the pass without the weights.
        """
        if not isinstance(self.architecture, UNetArchitecture):
            raise NotPlanned("a transformer", "a U-Net, for a prediction without a rehearsal", "use imagic-lora plan")
        memory = self.run.memory
        stochastic = self.full and memory.master_weights == "bf16-stochastic"
        tape = Tape(
            gradients_on=trains is not None,
            frees_gradients=memory.optimizer_in_backward,
            step_scratch=_ROUNDING if stochastic and tuned else 0,
        )
        options = self._layer_options(tuned, trains, stochastic)
        # autocast caches the casts of trained weights alone
        layers = Layers(tape, options, cache=[] if memory.autocast_cache and options.trained else None)
        unet = UNet(self.architecture.denoiser, layers, memory.gradient_checkpointing and trains is not None)
        tokens = self.architecture.conditioning["tokens"][1]
        out = unet.forward(self.pixels // self.architecture.vae_scale_factor**2, batch, tokens, tokens_need_grad=trains == "embed")
        # autocast clears its cache at the end of a forward pass; the backward pass of checkpointed blocks would count layers twice
        counts, layers.cache = replace(layers, cache=None), None
        if trains:
            tape.backward(out)
        return counts, tape.counter.peak

    def _layer_options(self, tuned: bool, trains: Literal["embed", "tune"] | None, stochastic: bool) -> LayerOptions:
        run, lora = self.run, tuned and self.run.tune.mode == "lora"
        return LayerOptions(
            itemsize=self.itemsize,
            weight_itemsize=4 if self.full and not stochastic else self.itemsize,
            trained=self.full and trains == "tune",
            rank=run.tune.rank if lora else 0,
            targets=self.architecture.lora_targets.get(run.tune.targets, ()) if lora else (),
            adapters=self.photos if trains == "tune" else 1,
            quantize=run.memory.quantize,
            fp32_norms=self.assumed.device == "cuda",
            optimizer=self.assumed.optimizer,
        )

    def _vae_pass(self, decode: bool, images: int = 1) -> tuple[int, int]:
        """Runs the symbolic encoder or decoder of the VAE once.

        Args:
            decode: True for the decoder, False for the encoder.
            images: number of images in the batch.

        Returns:
            Bytes of the weights, and the peak in bytes of the pass without them.
        """
        memory, pixels = self.run.memory, self.pixels
        if memory.vae_tiling:
            pixels = min(pixels, self.architecture.vae["sample_size"] ** 2)
        itemsize = 4 if self.architecture.vae_overflows_fp16 and self.assumed.dtype == "fp16" else self.itemsize
        layers = Layers(Tape(gradients_on=False), LayerOptions(itemsize, itemsize))
        vae_forward(self.architecture.vae, layers, pixels, 1 if memory.vae_slicing else images, decode)
        return layers.bytes, layers.tape.counter.peak
