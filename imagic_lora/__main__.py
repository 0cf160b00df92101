"""The entry point of ``python -m imagic_lora`` and ``accelerate launch -m imagic_lora``."""

import sys

from .cli.app import main

if __name__ == "__main__":
    sys.exit(main())
