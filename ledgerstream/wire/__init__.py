"""Bytes to messages and back. Pure: no socket, no file, no clock.

`batches.py` record batches (v2) as headers and records; `columns.py` record batches as numpy
columns, by numba kernels, and the only file here that imports numba; `frames.py` length-prefixed
frames; `messages.py` kio's messages by API and version; `hot.py` the replies of Produce and Fetch,
encoded by hand; `consumerprotocol.py` what members of a classic group say to each other.
"""
