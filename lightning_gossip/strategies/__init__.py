"""Lightning glue only: one file a strategy over shared layers, and every reach into Lightning's private parts.

May import parameter_server, exchange, rules, transport, control, and Lightning. Read ``meeting`` (ranks that start,
meet and end), ``surviving`` (those that are left go on), ``consensus`` (evaluation on the consensus model, with
``window``), ``saving`` (checkpoints of it, with ``checkpoint`` and ``saved_state``), ``dealing`` (who does what of the
work, and who decides, with ``counting``, ``dealt_epochs`` and ``dealt_batches``), ``base`` (the life of a fit),
``clocked`` and over it ``pairwise`` (partners that exchange, with ``update_hooks``) and ``all_reduced`` (all meet in
one start), then a file a strategy. Beside them ``joining`` (a process that comes to a running training),
``launchers``, ``ownership``, ``stand_in``, and what knows Lightning's private parts: ``lightning_compat``,
``lightning_counts``, ``lightning_members``, ``lightning_dealing``. ``lightning_names`` alone imports Lightning, under
the name that ``lightning_family`` decides on. ``registration`` gives strategies their names.
``fabric`` launches replicas for a loop of Lightning Fabric.
"""
