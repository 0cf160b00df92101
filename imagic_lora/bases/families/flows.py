"""What the flow families share: their pipeline of diffusers, with the Euler scheduler of the base."""

from __future__ import annotations

from typing import Any, ClassVar

from ...core.conditioning import Conditioning
from ..base import PipelineKind
from ..loading import schedulers
from .common import LatentBase


class FlowBase(LatentBase):
    """A base whose process is a flow. Arguments as for :class:`~imagic_lora.bases.families.common.LatentBase`."""

    pipelines: ClassVar[dict[PipelineKind, Any]]

    def pipeline_kwargs(self, conditioning: Conditioning, null: Conditioning | None) -> dict[str, Any]:
        kwargs = {"prompt_embeds": conditioning.tokens, "negative_prompt_embeds": None if null is None else null.tokens}
        if conditioning.pooled is None:
            return kwargs
        return kwargs | {
            "pooled_prompt_embeds": conditioning.pooled,
            "negative_pooled_prompt_embeds": None if null is None else null.pooled,
        }

    def pipeline(self, kind: PipelineKind, scheduler_class: type | None = None) -> Any:
        if scheduler_class is not None or kind not in self.pipelines:
            raise self._no_scheduler()
        self._move(self._denoiser)
        components = dict.fromkeys((*self.optional_components, *self.architecture.text_encoders)) | self._tokenizers
        pipe = self.pipelines[kind](
            **components,
            **{self.component: self._denoiser},
            vae=self._on_device("vae"),
            scheduler=schedulers.copied(self._scheduler),
            **self.unused_components,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe
