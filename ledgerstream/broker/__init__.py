"""The broker: wishes from the wire become decisions, appends and replies.

`server.py` reads frames and writes replies in order; `dispatch.py` finds the conversation (one file
each: `produce`, `fetch`, `metadata`, `admin`, …); `replica.py` waits until a partition is durable;
`host.py` performs the decisions of a pure machine; `node.py` puts them together. Never imports
`client`, `stream` or numba: they meet on the wire.
"""
