"""Processors: events in, results out, each event counted exactly once.

Owns the declaration of a processor, its state, and the step that moves results and offsets into
Postgres in one transaction. Never talks to a broker's insides: it reads the log as any client does.

Read in this order: `processor` (what a user writes), `batch`, `state` over `keyed` (a table behind
a hash index, with undo and digest) and `arena` (sliding windows), `machine` (one partition's pure
step), `tables` and `pgcopy` (result rows and their bytes), then the edge: `source`, `sink`,
`snapshot`, `worker`, `postgres`. `exactly-once` is the contract of `sink`.
"""
