"""What runs on the stream: event types, their generators, and the processors over them.

A processor declares where its events come from, what it remembers and which tables it fills, and
asks `risk` what they mean. It never opens a connection, reads a clock or rolls a die. Read
`payments.py`, then `fraud.py`; `trades.py`, then `market.py`.
"""
