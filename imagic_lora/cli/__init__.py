"""The command line ``imagic-lora COMMAND``.

May import: every room but ``web``, which ``commands/web.py`` starts. Only ``web`` imports it: its worker calls the commands.

- ``app.py``: the table of commands, and the exit codes
- ``commands/``: one file for each group of commands
- ``libraries.py``: imports of torch and diffusers, as fast as possible
- ``options.py``: flags that several commands share; parses lists and ranges of etas and seeds
- ``console.py``: terminal output: tables, progress, warnings, errors, JSON
- ``listening.py``: the progress of a command, for a program that runs its function
- ``interrupts.py``: Ctrl-C and SIGTERM
- ``editing.py``: the images of ``edit``: checked, generated and written
- ``sweeping.py``: checks, images, scores and files of ``sweep``
- ``searching.py``: the search of ``edit --eta auto``, with its progress and its cost
- ``batching.py``: the run of ``batch``, with its progress and its results
- ``comparing/``: models, settings, run and files of ``compare``
- ``benching.py``: cases, runs and scores of ``bench tedbench``, ``bench pie`` and ``bench score``
- ``measuring.py``: the measurement of ``doctor --measure``, with its progress and its report
- ``demo.py``: the demo, called by ``commands/demo.py``
"""
