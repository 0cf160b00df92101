"""Loading of a base: from the user's ``--base`` argument to the components in memory. No code that a base contains is executed.

May import: core, bases; ``registry.py`` the families. Must not know: adapters, training, sampling, commands.

- ``registry.py``: loads a base by name, folder, file or hub id
- ``known.py``: the named bases, built-in and from the user's YAML file, by name and by source; without torch
- ``published.py``: the published configs of the built-in bases; without torch
- ``configs.py``: the architecture of a base: reads the configs of a folder; without torch
- ``keys.py``: every key of these configs: honoured, harmless or refused; without torch
- ``flow_keys.py``: the same for Stable Diffusion 3 and FLUX.2 klein; without torch
- ``sizes.py``: checks that the sizes in configs are plausible and match; without torch
- ``vetting.py``: checks JSON files and safetensors headers of untrusted bases; without torch
- ``files.py``: weight files and fingerprints
- ``components.py``: builds denoiser, VAE, text encoders and tokenizers, and loads their weights
- ``schedulers.py``: the scheduler that samples and the one that trains
- ``tokenizers.py``: the files of CLIP, T5 and Qwen tokenizers; without torch
- ``progress.py``: hides the progress bars of diffusers and transformers
- ``original/``: single files in the original layout
- ``vocabulary/``: the merges of CLIP's vocabulary, for single files
"""
