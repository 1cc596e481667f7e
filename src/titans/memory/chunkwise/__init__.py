"""The fast path in plain torch.

`chunk.py` is the algorithm of one chunk, forward and backward. `groups.py` runs chunks in sequence and keeps
for the backward one state for each group of them. `columns.py` cuts ragged rows into chunks. `scan.py` puts
these together. `anchored.py` is the form for large chunks whose tokens are read with the weights of the
chunk's start, `delta.py` the one for chunks of a single token, the delta rule. `formed.py` and `windows.py`
are for rules, gates and networks that need more than `chunk.py` has.
"""
