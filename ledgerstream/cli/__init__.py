"""The command line: one command a file, or a few that belong together.

It parses, calls the rooms below, and shows; it decides nothing. `main` is the entry and turns
errors into sentences and exit codes; `options` names the options that commands share, `show` is how
tables, numbers and bars look. Imports of anything heavy stand inside the command that needs it, so
that `ledgerstream --help` and `ledgerstream broker` load neither numba nor pandas.
"""
