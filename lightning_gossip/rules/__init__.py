"""Pure functions of the papers: who talks to whom (``schedule``) and what is done with what arrives (``mixing``).

May import argument checks and nothing else of the package: no process group is in sight. Read ``schedule``, then
``mixing``.
"""
