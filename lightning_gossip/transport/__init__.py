"""How tensors travel between ranks; knows no algorithm.

May import control. Read ``interface`` (what an exchange asks of a transport), ``header``, ``link`` (two ends, and what
goes before a payload), ``shared_memory`` (snapshots that others read where they were written), ``lanes`` and
``link_transport`` (both together), ``doors`` (links that one end opens), ``nccl``; ``all_reduce`` (all ranks at once),
``voted_all_reduce`` (all that are left, or none) and ``group`` (torch's default group, which follows the members).
"""
