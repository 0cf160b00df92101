"""Stage 3: generates images from conditionings with the tuned denoiser.

May import: core, photos, bases, memory, adapters. Must not know: training, methods, commands.

- ``mixing.py``: interpolates the embeddings, or the vectors of the tokens, of photo and target prompt
- ``generate.py``: generates images from conditionings and seeds, in batches
- ``diffusion.py``: latents of a batch through pipelines and schedulers of diffusers
- ``flow.py``: latents of a batch on a flow base, by our own Euler steps, from every start
- ``guidance.py``: the formula of classifier-free guidance
- ``trajectory.py``: the one loop over noise levels, from noise to photo or back, for methods that change latents or predictions on the way
- ``flow_trajectory.py``: the levels of a flow for that loop, by Euler's method
- ``attention.py``: reads and changes the attention probabilities of a U-Net, and restores its processors
- ``inversion.py``: computes the noise that reproduces the photo: DDIM inversion, edit-friendly inversion
- ``shared_calls.py``: images of several photos, with one call of the denoiser for all
- ``pipelines.py``: prepares and calls diffusers pipelines
- ``edit_pipeline.py``: a pipeline of diffusers with an adapter applied, for callers who go on from there
- ``checks.py``: checks prompts and settings before sampling
- ``editor.py``: the Editor, which keeps one base loaded and switches adapters
- ``keep.py``: edits pasted into the photo at its full size
- ``opening.py``: from a stored adapter to an Editor: settings for this machine, and the base
- ``kept.py``: keeps an editor from one edit to the next, in a process that runs many
- ``outputs.py``: the files of an edit: names, the check that no other image is replaced, the sheet
- ``metadata.py``: the metadata of an image: its schema, and the text that A1111 reads
- ``reproduce.py``: makes an image again from its metadata, and compares the pixels
- ``sweeps/``: sweeps over eta and seed, scores of their images, and the suggested eta
"""
