"""Methods of editing a photo, with one common interface.

May import: core, photos, bases, memory, adapters, sampling, training. Must not know: benchmarks, commands.

- ``method.py``: the interface (request, result, needs, predicted passes) and the measured cost of an edit
- ``imagic.py``: Imagic, in either mode and with any settings
- ``sampled.py``: the common form of methods that only sample: an encoded request, and settings for each row
- ``generated.py``: methods that call stage 3 on the untuned base; the target prompt alone
- ``subject.py``: DreamBooth and textual inversion, which learn the subject of the photo
- ``sdedit.py``: SDEdit, image to image
- ``magicmix.py``: MagicMix, of a photo or of a prompt with a prompt
- ``diffedit.py``: DiffEdit, which finds its own mask, or takes a given one
- ``blended.py``: blended latent diffusion, in a given mask
- ``inpaint.py``: inpainting by a model that was trained for it
- ``masks.py``: masks of the photo and of the latents, sampling inside a mask
- ``catalogue.py``: the methods by name
- ``comparison/``: several methods on one photo, on one page
- ``inversions/``: methods that invert the photo: DDIM inversion, DDIB, null-text inversion and others
- ``flows/``: methods for flows alone: FlowEdit, RF-Inversion
- ``attention/``: methods that read or change attention: Prompt-to-Prompt, direct inversion, LEDITS++
"""
