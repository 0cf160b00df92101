"""Models: everything above asks a :class:`~imagic_lora.bases.base.Base`, and never which family it is.

May import: core, photos. Must not know: adapters, training, sampling, commands.

- ``base.py``: the protocol that every family answers
- ``families/``: one short file a family
- ``loading/``: folders, single files, hub ids; what is checked before a library reads them; names; fingerprints
- ``architecture.py``: the configs of a base's components, without torch
- ``layers.py``: LoRA targets, 4-bit blocks, parameter counts, without torch
- ``quantization.py``: the linear layers of a frozen denoiser in 4 bits
"""
