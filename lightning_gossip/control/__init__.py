"""The run's store: who stops and why, who has arrived, who is alive.

May import torch and nothing else of the package but argument checks. Read ``stop``, ``run`` and ``calls``.
"""
