"""Models. Code above this package uses only the protocol :class:`~imagic_lora.bases.base.Base` and never asks for the family.

May import: core, photos. Must not know: adapters, training, sampling, commands.

- ``base.py``: the protocol that every model family implements
- ``tokens.py``: the tokens of a prompt
- ``process.py``: the noise processes: diffusion and rectified flow
- ``altered.py``: changes of a denoiser that are undone bit for bit, whatever interrupts them
- ``families/``: one file per model family
- ``loading/``: loading from folders, single files and hub ids; checks of untrusted files; named bases; fingerprints
- ``architecture.py``: the configs of a base's components; without torch
- ``layers.py``: LoRA targets, 4-bit block size, parameter counts; without torch
- ``quantization.py``: 4-bit quantization of the linear layers of a frozen denoiser
"""
