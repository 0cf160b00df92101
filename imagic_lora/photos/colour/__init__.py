"""Colours: conversion to sRGB.

May import: core. Must not know: files, models, adapters, commands.

- ``conversion.py``: conversion of an image of any mode to 8-bit sRGB on a white background
"""
