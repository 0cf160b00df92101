"""What is kept of a photo: LoRA or full weights, both embeddings, a record.

May import: core, photos, bases. Must not know: training, sampling, commands. No torch in ``atomic``, ``record``, ``adapter``, ``store``.

- ``store.py``: a folder of adapters, one writer a name
- ``adapter.py``: a stored adapter: its folder, its record, its files
- ``record.py``: ``adapter.json``
- ``atomic.py``: folders that are written whole or not at all, with a manifest of hashes
- ``contents.py``: embeddings, photo and weights of a stored adapter, checked before use
- ``lora.py``: LoRA layers: attach, load, save
- ``full.py``: all weights: train, load, save
- ``card.py``: ``README.md`` of an adapter
- ``compress.py``: a full adapter to a LoRA adapter
- ``export.py``: an adapter for ComfyUI, A1111 and diffusers
"""
