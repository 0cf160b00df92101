"""Single files: checkpoints in the original layout, as ComfyUI, A1111 and Stability's own code read them.

May import: core, bases, loading. Must not know: families, adapters, training, sampling, commands.

- ``architecture.py``: the architecture of a single file; without torch
- ``files.py``: its tensors under diffusers' names, and its tokenizer
"""
