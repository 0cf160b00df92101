"""Benchmarks: run methods on cases and score the edited images.

May import: every room except cli. Must not know: whether a command or a script runs it.

- ``runner.py``: runs every method on every case, and resumes an interrupted run
- ``critters.py``: CritterBench as such a run
- ``cases.py``: the cases of CritterBench: a photo, a target prompt, the true edit
- ``bounds.py``: reference rows: the unedited photo, and the true edit encoded and decoded by the VAE
- ``catalogue.py``: the methods by name; the reference recipes are the YAML files in this folder
- ``scores.py``: the scores of an edited image
- ``metrics.py``: PSNR, and CLIP similarities on critter images
- ``intervals.py``: means with confidence intervals
- ``summary.py``: means with confidence intervals, costs, and the comparison of rows
- ``table.py``: a table of text cells
- ``page.py``: the tables, and the HTML page (template ``page.html``)
- ``worker.py``: the initialisation of a worker process
- ``evaluator/``: scores of an edited picture against its photo and its prompts: CLIP, LPIPS, DINO, PSNR, SSIM, MSE
- ``field/``: the benchmarks of the field: TEdBench, PIE-Bench, pictures that anybody made
- ``machine/``: peak memory and speed of this machine, beside the predictions
- ``study/``: the user study: its page, its key, its rates
"""
