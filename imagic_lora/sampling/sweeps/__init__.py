"""Sweeps over eta and seed: their images, the scores of the images, and the eta that the scores suggest.

May import: as sampling. Must not know: training, methods, commands. Only ``suggest.py`` does not use torch.

- ``sweep.py``: the images of a sweep, their scores, and the search for an eta
- ``scores.py``: scores of images that need no other model than the base
- ``metrics.py``: scores of images by CLIP and DINOv2
- ``suggest.py``: the rules that suggest an eta
- ``drawing.py``: the sheet and the plot of a sweep
"""
