"""No garbage collection while the tests are collected: conftest.py imports this first, and turns it on again afterwards.

What the libraries create when they are imported stays, and looking at it again and again takes a fifth of the collection.
"""

from __future__ import annotations

import gc

gc.disable()
