"""Pure functions of the papers: who talks to whom, and what is done with what arrives.

May import argument checks and nothing else of the package: no process group is in sight. Read ``schedule``, ``asking``,
``mixing``, ``outer`` (the outer step), ``fragments`` (which part of a model travels when), ``simulation`` (what becomes
of many replicas, and of their time).
"""
