"""`nbbn bench`: how fast each path and each peer is on given shapes, and how near the machine's limit.

The modules, in the order in which to read them:

- `shapes`, `cases`: what is timed, and the arrays;
- `contenders`, `peers`: who is timed, nbbn and the other libraries;
- `oracle`: what the answers should be;
- `limits`: what the memory can do;
- `timing`: turns, rounds and spreads;
- `measure`: all of these together;
- `record`, `model`: what came out, as JSON, and how it grows with the size;
- `tables`, `plot`, `compare`: what it looks like, and what changed;
- `request`, `run`: what was asked for, and the command from its first line to its last.
"""
