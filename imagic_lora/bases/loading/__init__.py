"""From what a user calls a base to its components in memory. Nothing that comes with a base is run.

May import: core, bases; ``registry.py`` the families. Must not know: adapters, training, sampling, commands.

- ``registry.py``: a name, a folder, a file or a hub id to a loaded base
- ``known.py``: bases with a name, a user's own among them, without torch
- ``published.py``: the published configs of the named ones, without torch
- ``configs.py``: the configs of a folder or a single file, without torch
- ``vetting.py``: checks of a stranger's JSON and headers, without torch
- ``files.py``: weight files and fingerprints
- ``single.py``: a single file in the original layout
- ``components.py``: U-Net, VAE, text encoder, tokenizer, scheduler, built and filled
- ``tokenizers.py``: the files of a CLIP tokenizer, without torch
- ``progress.py``: the libraries' progress bars, hidden
- ``vocabulary/``: CLIP's own vocabulary, for single files
"""
