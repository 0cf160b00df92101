"""The command line.

May import: everything. Nothing imports it.

- ``app.py``: the table of commands, and exit codes
- ``commands/``: one file a command group
- ``options.py``: flags that several commands share, ranges of eta and seeds
- ``console.py``: what people see: progress, tables, errors, JSON
- ``interrupts.py``: Ctrl-C and SIGTERM during a fit
- ``demo.py``: what the command ``demo`` runs
"""
