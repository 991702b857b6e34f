"""Processors: events in, results out, each event counted exactly once.

Owns the declaration of a processor, its state, and the step that moves results and offsets into
Postgres in one transaction. Never talks to a broker's insides: it reads the log as any client does.

Read in this order. What a user writes: `processor`, `tables`, `kernels`. The pure half: `batch`,
`state` over `keyed` (rows behind a hash index, with undo and digest) and `arena` (sliding windows,
over `arenakernels`), `windows` by watermark, kept in `windowstate` over `windowkernels`
(`windowcolumns`: what they keep, by numbers of `windowplan`; `windowvalues` over `valuekernels`,
`sketch` and `decay`: the columns that are more than a sum; `reports`: events that are corrected and
cancelled, `reported` over `reportkernels`), `sessions` in `sessionstate` over `sessionkernels`,
`pgcopy` and `newest`, and `machine`, one partition's step. The edge: `source` (log to columns),
`sink` (claims and the transaction of a step; `schema` has its tables, `faults` what can go wrong),
`snapshots` (a `snapshot` in `pages`, of which those that changed are written) and `restore`. What
moves it: `worker`, then `streaming`, `committer`, `lookout`, `snapshotter` and `partitions`;
`several`, where a processor has several topics. Where one emits: `outputs` (events as columns),
`witness` (what is done, and in which order; pure) and `outbox` (the log's side). Beside them:
`postgres` and its `keeper`, `version`, `warm`, and `single`, the `on_event` style.

Those who try, prove and watch: `trial` (a data frame in, frames out), `verify` over `replay`,
`pgread` and `compare`, `explain`; `watch` writes for `status` what a worker sees; `retry` brings
dead letters back; `frames` is how results look in pandas.
"""
