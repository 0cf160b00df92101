"""Colours: conversion to sRGB.

May import: core. Must not know: files, models, adapters, commands.

- ``conversion.py``: conversion of an image of any mode to 8-bit sRGB on a white background
- ``spaces.py``: colour spaces stated by code points or chromaticities, and their ICC profiles
- ``hdr.py``: tone mapping of PQ and HLG
"""
