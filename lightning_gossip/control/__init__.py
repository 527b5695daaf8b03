"""The run's store: who stops and why, who has arrived, who is alive.

May import torch and nothing else of the package but argument checks. Read ``stop``, ``run``, ``calls``
(what all do at one step), ``members`` and ``votes`` (runs that go on without those that they lose) and ``interpreter``
(processes that see what this one sees).
"""
