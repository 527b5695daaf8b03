"""What several benchmarks share; none of it knows a benchmark.

Reading order: ``options`` (a command line), ``rows`` (CSV files of results), ``tables`` and ``plots`` (what is made of
them), ``machine``; ``workloads`` (what is trained) and ``trainers``; ``processes``, ``ranks`` and ``namespaces`` (who
starts it), ``side_by_side`` (blocks that take turns) and ``meters`` (what they measure beside time).
"""
