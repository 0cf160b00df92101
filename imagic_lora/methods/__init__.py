"""Imagic and what it is compared with, each behind one call."""
