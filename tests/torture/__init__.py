"""Fault injection, many cases each: files, processes, numbers and untrusted input; ``make torture``.

Every type of fault is one module with one generator, ``torture(cases, seed, folder)``. It runs that many cases in its own folder and
yields, for each, an empty string on success or one line that describes the failure.
"""
