"""Everything that may go wrong with files, processes, numbers and strangers' input, done many times over: ``make torture``.

Every kind of torture is one module with one generator, ``torture(cases, seed, folder)``: it does that many cases in a folder of its own
and yields, for each, an empty string where all was well, or one line that says what was not.
"""
