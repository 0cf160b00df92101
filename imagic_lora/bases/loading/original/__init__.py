"""Single files: checkpoints in the original layout, as ComfyUI, A1111 and Stability's own code read them.

May import: core, bases, loading. Must not know: families, adapters, training, sampling, commands.

- ``architecture.py``: the architecture of a single file; without torch
- ``detection.py``: the family that its tensors belong to, and the models that only look like one; without torch
- ``statements.py``: what it declares about itself in tensors, metadata and files beside it; without torch
- ``yaml_config.py``: the YAML config of the original code beside it; without torch
- ``transformers.py``: a flow transformer in one file, with the other parts of a named base
- ``files.py``: its tensors under diffusers' names, and its tokenizer
"""
