"""Every setting and its default, as pydantic models. Recipes of bases and presets of cards (``core/settings/``) replace some defaults.

The command line, YAML files, recipes and presets fill these models. Values are merged in the order built-in < recipe of the base <
preset of the card < file < flags. Only explicitly given values are merged. The docstring of a field is its help text on the command line.
"""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Group, Parameter
from pydantic import Field

from .config_group import Config, flag
from .device_config import DEVICE_GROUP, MemoryConfig

Mode = Literal["lora", "full", "embedding"]
TunedMode = Literal["lora", "full"]  # the modes with a stage 2
FitMethod = Literal["imagic", "dreambooth", "textual-inversion"]
Timesteps = Literal["stratified", "uniform"]
Preset = Literal["8gb", "12gb", "16gb", "24gb", "cpu"]
PresetOrAuto = Literal["auto", "8gb", "12gb", "16gb", "24gb", "cpu"]
Scheduler = Literal["base", "ddim", "dpm++2m", "dpm++2m-sde", "unipc", "euler", "lcm"]
EarlyStop = Literal["off", "embed", "tune", "both"]

_CHECKPOINTS = Group("Checkpoints, for --resume after an interruption", sort_key=6)
_MONITORING = Group("Monitoring: convergence, early stopping, previews", sort_key=7)
_ADVANCED = Parameter(group=Group("Sampling, advanced", sort_key=5))


class EmbedConfig(Config):
    """Stage 1: optimises the embedding of the target prompt on the photo. The model is frozen."""

    steps: int = Field(default=500, ge=1, le=100_000)
    """Number of training steps of the embedding."""
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    """Learning rate of the embedding."""
    batch_size: int = Field(default=1, ge=1, le=256)
    """Number of noised copies of the photo per training step, on each process."""
    timesteps: Timesteps = "stratified"
    """How the timesteps of the training samples are drawn. stratified: evenly spread over a batch and over successive steps. uniform: each
    one independently."""
    space: Literal["output", "input"] = "output"
    """What is optimised. output: the embedding that the text encoder returns, as in the paper. input: the vectors of the prompt's tokens
    that it encodes, padding included. An edit then encodes the words of the target prompt and what the fit stored in the padding as one
    caption (measured in docs/log.md). Stage 1 needs the text encoders in memory, and a learning_rate that suits the size of the vectors."""
    noise: float = Field(default=0.0, ge=0, le=10)
    """Standard deviation of noise that every training sample adds to the embedding, as a multiple of the standard deviation of the
    embedding of the target prompt. 0: none."""
    tokens: Literal["words", "all"] = "all"
    """Tokens that are trained. all: every token, padding too. words: those of the prompt with its start and end; padding stays as it is.
    Text encoders of language models give hundreds of padding tokens, which no word owns."""
    relative: bool = False
    """Learning rate and noise in units of the size of each token (its root mean square) instead of 1: the same rate then fits text encoders
    of any scale."""

    @property
    def stores_difference(self) -> bool:
        """Whether the difference between the optimised and the target embedding is what is trained, and stored in bf16."""
        return self.relative or self.tokens == "words"


class TuneConfig(Config):
    """Stage 2: trains the denoiser on the photo. The optimised embedding is fixed. Mode embedding has no stage 2: the other settings of
    this group are errors there."""

    mode: Annotated[Mode, flag("mode")] = "lora"
    """What is trained after the embedding. lora: a small PEFT adapter (LoRA). full: the whole denoiser, which needs more memory and disk
    space. embedding: nothing; there is no stage 2, and edits use the denoiser of the base."""
    steps: int = Field(default=300, ge=1, le=100_000)
    """Number of training steps of the denoiser."""
    learning_rate: float = Field(default=2e-4, gt=0, le=1)
    """Learning rate of the denoiser."""
    batch_size: int = Field(default=1, ge=1, le=256)
    """Number of noised copies of the photo per training step, on each process."""
    timesteps: Timesteps = "stratified"
    """How the timesteps of the training samples are drawn. stratified: evenly spread over a batch and over successive steps. uniform: each
    one independently."""
    rank: Annotated[int, flag("rank")] = Field(default=16, ge=1, le=1024)
    """Rank of the LoRA matrices. A higher rank can learn more and gives a larger adapter. Only for mode lora."""
    alpha: Annotated[float | None, flag("alpha")] = Field(default=None, gt=0, allow_inf_nan=False)
    """LoRA alpha: the LoRA update is scaled by alpha / rank. Without it alpha equals the rank (scale 1). Only for mode lora."""
    targets: Annotated[Literal["attention", "attention+conv", "attention+mlp", "all"], flag("targets")] = "attention"
    """Layers that LoRA adapts. attention: the attention projections. attention+conv: also the convolutions of the residual blocks of a
    U-Net. attention+mlp: also the feed-forward layers of a transformer. all: every linear and convolution layer. Only for mode lora."""


class DreamBoothConfig(Config):
    """DreamBooth with prior preservation (arXiv 2208.12242). Only for method dreambooth."""

    class_prompt: Annotated[str, flag("class-prompt")] = ""
    """The prompt without the rare word, such as "a photo of a dog". The base generates the class pictures from it, and the fit keeps what
    the base makes of it. Needed unless prior_weight is 0."""
    class_pictures: Annotated[int, flag("class-pictures")] = Field(default=100, ge=1, le=10_000)
    """Number of class pictures. They are generated once, from noise with the sampling settings of stage 3, and kept in the user's cache
    (XDG_CACHE_HOME) for later fits of the same base, class_prompt, sampling settings, size and class_seed."""
    class_seed: Annotated[int, flag("class-seed")] = Field(default=0, ge=0, lt=2**32)
    """Seed of the class pictures."""
    prior_weight: Annotated[float, flag("prior-weight")] = Field(default=1.0, ge=0, le=100)
    """Weight of the loss on the class pictures, beside that on the photos. 0: no class pictures."""


class InversionConfig(Config):
    """Textual inversion (arXiv 2208.01618). Only for method textual-inversion. Steps, learning rate and batch size are those of stage 1."""

    word: Annotated[str | None, flag("word")] = Field(default=None, min_length=1, max_length=100)
    """The new word. Default: the one in angle brackets in the prompt."""
    initial_word: Annotated[str, flag("initial-word")] = ""
    """A word of the vocabulary whose vector the new word starts from, such as dog. Needed."""
    vectors: Annotated[int, flag("vectors")] = Field(default=1, ge=1, le=64)
    """Number of vectors of the new word, each of which takes the place of one token. More of them keep more of the photo and can be edited
    less."""
    templates: Annotated[Literal["object", "prompt"], flag("templates")] = "object"
    """Prompts of the training. object: at every step one of the 27 templates of the paper, such as "a photo of a WORD". prompt: the
    target prompt alone."""


class EditConfig(Config):
    """Stage 3: generates images from the interpolated embedding."""

    guidance_scale: float = Field(default=7.5, ge=0, le=50)
    """Scale of classifier-free guidance: a higher value follows the prompt more closely. 1 and below turn guidance off. For consistency
    models (LCM) the scale is an input of the denoiser, in training as well."""
    steps: int = Field(default=50, ge=1, le=1000)
    """Number of sampling steps."""
    negative_prompt: str = ""
    """What the image must not show. Guidance leads away from it instead of from the empty prompt; needs a guidance_scale above 1."""
    guidance_rescale: Annotated[float, _ADVANCED] = Field(default=0.0, ge=0, le=1)
    """Rescales the guided prediction to the standard deviation of the one that follows the prompt (arXiv 2305.08891, equations 15 and 16),
    against overexposed images at a high guidance_scale. 0: off. 1: in full. The paper uses 0.7. Needs a guidance_scale above 1."""
    scheduler: Scheduler = "base"
    """Sampling scheduler of diffusers, built from the config of the base's own. base: the base's own. dpm++2m, dpm++2m-sde and unipc need
    fewer steps (20 to 30). lcm: for latent consistency models. Start inverted always uses DDIM. Flows (Stable Diffusion 3, FLUX.2 klein)
    are sampled by Euler's method: base or euler."""
    karras_sigmas: Annotated[bool, _ADVANCED] = False
    """Space the noise levels as in arXiv 2206.00364, equation 5. Only for dpm++2m, dpm++2m-sde, unipc and euler, or a base with such a
    scheduler."""
    ddim_eta: Annotated[float, _ADVANCED] = Field(default=0.0, ge=0, le=1)
    """Amount of noise that DDIM, or Euler's method for a flow, adds at every step. 0: none, sampling is deterministic. 1: as much as DDPM.
    This is not the eta of the interpolation."""
    start: Literal["noise", "image", "inverted", "flow"] = "noise"
    """Where sampling starts. noise: from random noise. image: from the photo with added noise (see strength). inverted: from noise that
    reproduces the photo, which keeps position and background best. With ddim_eta 0, inverted is DDIM inversion, and the seed has no effect.
    With a ddim_eta above 0 it is edit-friendly inversion (arXiv 2304.06140), which depends on the seed and allows larger changes.
    flow, only on a flow: from the photo along the difference of the velocities for the edit and for the photo (FlowEdit, arXiv 2412.08629,
    with the optimised embedding as the source prompt). Nothing is inverted, and eta 0 is the photo."""
    source_eta: Annotated[float, _ADVANCED] = Field(default=0.0, ge=0, le=1)
    """Only for starts inverted and flow: eta of the embedding with which the photo is inverted, or that stands for it. 0: the optimised
    embedding. The subject keeps its identity best at a value just below the eta where the edit begins to appear. An edit at a lower eta is
    inverted at its own eta."""
    padding_eta: Annotated[float, _ADVANCED] = Field(default=0.3, ge=0, le=2)
    """Only for adapters with embed.space input: eta of the padding as a multiple of the eta of the words. The padding holds the identity: a
    lower value keeps more of the photo."""
    strength: float = Field(default=0.8, gt=0, le=1)
    """Only for starts image and flow: how much noise is added to the photo, as a share of the sampling steps. 1: nothing of the photo is
    kept by start image. Lower values keep more."""
    reference: bool = False
    """Only on FLUX.2 klein: the denoiser also sees the photo without noise, as the reference image of an instruction edit, so that identity
    comes from the adapter and from the photo. Takes about twice the time."""
    batch_size: int = Field(default=4, ge=1, le=256)
    """Number of images generated at once. A smaller number needs less memory."""


class CheckpointConfig(Config):
    """How often a fit writes a checkpoint. It also writes one at the end of a stage and when it is interrupted."""

    seconds: float = Field(default=300, gt=0, allow_inf_nan=False)
    """Time between two checkpoints, in seconds."""
    steps: int | None = Field(default=None, ge=1)
    """Also write a checkpoint every this many training steps. Without it only the time counts."""


class MonitoringConfig(Config):
    """What a fit measures and shows while it trains. Only early stopping changes what is trained."""

    convergence_every: Annotated[int, flag("convergence-every")] = Field(default=50, ge=0, le=100_000)
    """Evaluate the relative loss every this many training steps, and after the last step of a stage: the loss on 8 fixed pairs of timestep
    and noise, as a ratio to that of the frozen base with the target prompt. Each evaluation takes 8 forward passes through the denoiser.
    0: off."""
    early_stop: Annotated[EarlyStop, flag("early-stop")] = "off"
    """Stages that end early when their relative loss no longer falls. embed: stage 1. tune: stage 2. both: both stages."""
    patience: Annotated[int, flag("patience")] = Field(default=3, ge=1, le=1000)
    """Only with early stopping: a stage ends after this many evaluations in a row that do not improve the relative loss."""
    min_improvement: Annotated[float, flag("min-improvement")] = Field(default=0.01, ge=0, le=1)
    """Only with early stopping: an evaluation counts as an improvement if the relative loss is lower than the lowest one so far by more
    than this. 0.01 is a hundredth of the loss of the frozen base."""
    preview_every: Annotated[int, flag("preview-every")] = Field(default=0, ge=0, le=100_000)
    """Generate previews at several etas every this many training steps of stage 2, with the sampling settings of stage 3. A preview takes
    as long as an edit at four etas, and needs the memory of an edit on top of the states of the optimizer. 0: off."""


class RunConfig(Config):
    """All settings of a run: one photo, one target prompt."""

    preset: Annotated[PresetOrAuto, flag("preset")] = "auto"
    """Memory levers for a card of this size. auto: the fastest preset whose predicted peak fits 90% of the free memory of the card, or cpu
    without a card."""
    base: Annotated[str, flag("base")] = Field(default="sd15", min_length=1)
    """Base model: a name (sd15, sd21, sdxl, sdxl-turbo, sd3-medium, sd35-medium, klein-base-4b, klein-base-9b, critters, critters-dit, or
    one of your own; see imagic-lora bases), a folder in diffusers' format, a single .safetensors file, or a Hugging Face hub id."""
    revision: Annotated[str | None, flag("revision")] = None
    """Branch, tag or commit of the hub id given as base. Without it the default branch is used."""
    resolution: Annotated[int | None, flag("resolution")] = Field(default=None, ge=8, le=4096)
    """Resolution in pixels: the photo is scaled to an area of at most resolution x resolution, and keeps its shape. Without it the
    resolution of the base is used."""
    seed: Annotated[int, flag("seed")] = Field(default=0, ge=0, lt=2**63)
    """Seed of everything random: noise and timesteps of the training, the initial LoRA weights, and the noise of the preview."""
    eta: float = Field(default=0.7, ge=0, le=2)
    """Interpolation between photo and edit, for the preview and for edits without an eta of their own. 0: the reconstruction of the photo.
    1: the target prompt alone. Values above 1 extrapolate."""
    method: Annotated[FitMethod, flag("method")] = "imagic"
    """What a fit does. imagic: both stages on one photo, for edits of it. dreambooth: stage 2 on one photo or several, with a rare word in
    the prompt ("a photo of sks dog") and class pictures beside the photos. textual-inversion: finds the vectors of a new word in the prompt
    (in angle brackets) and changes no weight. The adapters of the last two make new images, and have no eta."""
    embed: Annotated[EmbedConfig, Parameter(group=Group("Stage 1: embed", sort_key=1))] = EmbedConfig()
    tune: Annotated[TuneConfig, Parameter(group=Group("Stage 2: tune", sort_key=2))] = TuneConfig()
    dreambooth: Annotated[DreamBoothConfig, Parameter(group=Group("DreamBooth", sort_key=2))] = DreamBoothConfig()
    inversion: Annotated[InversionConfig, Parameter(group=Group("Textual inversion", sort_key=2))] = InversionConfig()
    edit: Annotated[EditConfig, Parameter(group=Group("Stage 3: the preview, and the defaults of later edits", sort_key=3))] = EditConfig()
    memory: Annotated[MemoryConfig, Parameter(group=DEVICE_GROUP)] = MemoryConfig()
    checkpoint: Annotated[CheckpointConfig, Parameter(group=_CHECKPOINTS)] = CheckpointConfig()
    monitoring: Annotated[MonitoringConfig, Parameter(group=_MONITORING)] = MonitoringConfig()

    @property
    def stages(self) -> dict[str, EmbedConfig | TuneConfig]:
        """The training stages that run, by name, in their order."""
        stages: dict[str, EmbedConfig | TuneConfig] = {"embed": self.embed, "tune": self.tune}
        if self.method == "dreambooth":
            del stages["embed"]
        elif self.method == "textual-inversion" or self.tune.mode == "embedding":
            del stages["tune"]
        return stages

    @property
    def encodes_while_training(self) -> bool:
        """Whether stage 1 trains what the text encoders encode, so that it needs them."""
        return self.method == "textual-inversion" or (self.method == "imagic" and self.embed.space == "input")

    @property
    def prior(self) -> bool:
        """Whether class pictures are trained beside the photos."""
        return self.method == "dreambooth" and self.dreambooth.prior_weight > 0

    @property
    def edit_eta(self) -> float:
        """Eta of an edit without one of its own: 1, the prompt alone, for methods without an interpolation."""
        return self.eta if self.method == "imagic" else 1.0

    def stops_early(self, stage: str) -> bool:
        """Whether a stage ends when its relative loss no longer falls.

        Args:
            stage: ``embed`` or ``tune``.
        """
        return self.monitoring.early_stop in (stage, "both")

    @property
    def previews_every(self) -> int:
        """Number of steps between two previews of stage 2; 0 for none."""
        return self.monitoring.preview_every if "tune" in self.stages else 0
