"""`nbbn bench`: how fast each path and each peer is on given shapes, and how near the machine's limit."""
