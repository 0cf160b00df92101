"""Benchmarks: run methods on cases and score the edited images.

May import: every room except cli. Must not know: whether a command or a script runs it.

- ``critters.py``: runs every method on every case of CritterBench, and resumes an interrupted run
- ``cases.py``: the cases of CritterBench: a photo, a target prompt, the true edit
- ``bounds.py``: reference rows: the unedited photo, and the true edit encoded and decoded by the VAE
- ``catalogue.py``: the methods by name; the reference recipes are the YAML files in this folder
- ``scores.py``: the scores of an edited image
- ``metrics.py``: PSNR, and CLIP similarities on critter images
- ``summary.py``: means with confidence intervals, costs, and the comparison of rows
- ``page.py``: the tables, and the HTML page (template ``page.html``)
- ``worker.py``: the initialisation of a worker process
- ``machine/``: peak memory and speed of this machine, beside the predictions
- ``study/``: the user study: its page, its key, its rates
"""
