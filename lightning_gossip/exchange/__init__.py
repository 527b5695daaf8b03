"""The exchange clock, and what replicas have in common: snapshots, posting, waiting, applying; the consensus model.

May import rules, transport and control. Read ``flat`` (many tensors in one buffer), ``clock`` (a step's exchange, with
``in_flight``, ``flat_mixing``, ``stats`` and, for a GPU, ``staging``), ``outer_state``, ``outer_gossip`` and ``rounds``
(outer steps), ``agreement`` (exchanges for which nobody waits, as a table) with ``standstill``, ``snapshots``,
``spoken``, ``partners``, ``pairs``, ``callers`` and ``asynchronous``, their clock, and ``events``, many ranks of it
computed; then ``tensors``, ``models`` (what the ranks share) and ``consensus`` (the mean of the replicas).
``plain`` puts them together for a training loop without Lightning.
"""
