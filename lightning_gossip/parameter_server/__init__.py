"""Downpour's parameter server and its client, without Lightning (Dean et al. 2012, §4.1; design §3, §7).

May import exchange (for flat buffers and the consensus), transport and control. Read ``protocol`` (the messages, and
who says them), then the server's side: ``shard`` (the state), ``session`` and ``roster`` (workers), ``server`` (links),
``process``; and the worker's: ``displacement``, ``workers`` (their numbers), ``questions``, ``traffic``, ``client``,
``consensus``.
"""
