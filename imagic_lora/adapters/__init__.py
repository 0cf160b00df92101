"""Adapters on disk: LoRA weights, full weights or none, both embeddings, and a record of the fit.

May import: core, photos, bases. Must not know: training, sampling, commands. No torch in ``atomic``, ``durable``, ``manifest``,
``record``, ``adapter``, ``store``.

- ``store.py``: a folder of adapters, with one writer per name
- ``adapter.py``: a stored adapter: its folder, its record and its files
- ``record.py``: the schema of ``adapter.json``
- ``atomic.py``: folders that are written atomically
- ``manifest.py``: manifests of hashes, which verify the files of a folder
- ``writing.py``: folders that files are written to, and the errors of writing
- ``durable.py``: single files that survive a crash: a text replaced atomically, a log of events
- ``contents.py``: embeddings, photo and weights of a stored adapter, checked before use
- ``withheld.py``: adapters without their photo: what shows it, and the canvas made anew from the photo's file
- ``lora.py``: LoRA layers: attach, save, load, swap
- ``batched.py``: LoRA layers of several adapters on one denoiser, one for each part of a batch
- ``full.py``: full weights: train, save, load
- ``modes.py``: what each mode trains, and which files hold it
- ``card.py``: the ``README.md`` of an adapter
- ``compress.py``: converts a full adapter to a LoRA adapter
- ``importing.py``: copies an adapter from elsewhere into a store, after every check that needs no base
- ``hub.py``: sends an adapter to the Hugging Face Hub, and brings one from there into a store
- ``hub_card.py``: the model card of an adapter on the Hub
- ``export.py``: writes an adapter in the formats of ComfyUI, A1111 and diffusers
- ``kohya.py``: LoRA layers in the format of kohya's scripts, and the family of an adapter
- ``comfyui.py``: writes an edit for ComfyUI: LoRA, embeddings, nodes (``data/``) and workflows
- ``comfyui_graphs.py``: the nodes of an edit, for a checkpoint and for FLUX.2 klein
- ``comfyui_workflow.py``: a workflow of ComfyUI in both of its forms
- ``word.py``: the new word of textual inversion: its vectors, its files, prompts that contain it
- ``subject.py``: exports of DreamBooth's adapters and of new words
- ``original_names.py``: the names of SDXL's layers in Stability's code
- ``readers.py``: what these programs leave out of an export, or read in another way
"""
