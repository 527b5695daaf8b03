"""Lightning glue only: one file a strategy over shared layers, and every reach into Lightning's private parts.

May import parameter_server, exchange, rules, transport, control, and Lightning. Read ``meeting`` (ranks that start,
meet and end), ``consensus`` (evaluation and checkpoints on the consensus model), ``base`` (the life of a fit),
``pairwise`` (partners that exchange), then the strategies ``elastic_gossip``, ``gossip`` and ``downpour``;
``launchers``, ``checkpoint`` and ``lightning_compat`` beside them. ``registration`` gives them
their names without Lightning.
"""
