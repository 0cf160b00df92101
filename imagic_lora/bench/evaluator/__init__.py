"""The one evaluator of the benchmarks of the field: scores of an edited picture against its source and its prompts.

May import: as bench. Must not know: cases, methods, commands.

- ``sources.py``: the models by name, and where each is loaded from
- ``regions.py``: PSNR, SSIM and MSE of a whole picture, of its background and of the edited region
- ``lpips.py``: LPIPS with AlexNet, VGG16 or SqueezeNet
- ``structure.py``: the structure distance by the keys of DINO
- ``measures.py``: every measure by name: what it is, its model and preprocessing, its scale in tables
- ``evaluator.py``: a source, an edited picture and prompts in, the measures out
"""
