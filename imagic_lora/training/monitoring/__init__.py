"""What a fit measures and shows while it trains. Nothing here changes what is trained, except where early stopping ends a stage.

May import: what training may import, and the stages. Must not know: resuming, how a fit is put together (``fit.py``).

- ``convergence.py``: the relative loss on fixed pairs of timestep and noise, its plot, and early stopping
- ``previews.py``: strips of images at several etas during stage 2
- ``trackers.py``: logs the steps of a fit to TensorBoard
"""
