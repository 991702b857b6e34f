"""What is risky about a payment: features, rules, a score, and the sentence that explains it.

Pure functions over columns; numpy and numba only. This room knows nothing of streams, topics or
databases: it is handed columns and window totals, and hands back columns. Money is int64 cents,
times are int64 nanoseconds UTC, and nothing here depends on how events were cut into batches.

Read `features.py`, then `rules.py`, `score.py`, `explain.py`.
"""
