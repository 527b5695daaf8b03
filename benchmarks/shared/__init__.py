"""What several benchmarks share; none of it knows a benchmark.

Reading order: ``options`` (a command line), ``machine``, ``rows`` (CSV files of results), ``quartiles``, ``tables`` and
``plots`` (what is made of them); ``workloads`` (what is trained) and ``trainer``; ``processes``, ``ranks`` and
``namespaces`` (who starts it), ``side_by_side`` (blocks in turn), ``plain_loop`` and ``ddp_hooks`` (what else is
compared) and ``meters`` (what they measure beside time); ``outer_replay`` (outer steps by hand, with which tests
compare too).
"""
