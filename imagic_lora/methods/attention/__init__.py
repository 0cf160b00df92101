"""Methods that read or change the attention of a U-Net.

May import: core, photos, bases, sampling, and the other files of methods. Must not know: benchmarks, commands.

- ``words.py``: the tokens of words, and the alignment of the tokens of two prompts
- ``control.py``: the change of attention by Prompt-to-Prompt
- ``blend.py``: the mask of words from attention maps (local blend)
- ``branches.py``: sampling of source and target side by side
- ``prompt_to_prompt.py``: Prompt-to-Prompt, on photos and on generated images; direct inversion
- ``ledits.py``: LEDITS++
"""
