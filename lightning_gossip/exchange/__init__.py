"""The exchange clock, and what replicas have in common: snapshots, posting, waiting, applying; the consensus model.

May import rules, transport and control. Read ``flat`` (many tensors in one buffer), ``clock`` (a step's exchange), then
``consensus`` (the mean of the replicas) and ``models`` (that all begin with one model).
"""
