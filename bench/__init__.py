"""Every figure beside its peer: `python -m bench` for all, `python -m bench ID …` for some.

A row is a function in one of the modules here, registered under its id. It measures in pairs, ours
and the peer's in turn, and gives the median of each; the client is the same on both sides. Ours
syncs before each acknowledgement, Apache Kafka runs as it comes.
"""
