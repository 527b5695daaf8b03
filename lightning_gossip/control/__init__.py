"""The run's store: who stops and why, who has arrived, who is alive, who takes part.

May import torch and nothing else of the package but argument checks. Read ``stop``, ``run``, ``calls``
(what all do at one step), ``lookout`` (who waits, where each counts steps of its own), ``deal`` (work dealt on demand,
as a table) with ``dealer``, and ``interpreter`` (processes that see what this one sees). For runs that go on without
those that they lose: ``members`` (the protocol, as a table), ``member_log``, ``watching``, ``member_control``,
``joining`` (how a process comes to its seat), ``together`` (what is repeated), ``votes`` (what holds for all or for
none), ``process_id`` and ``store`` (a process of its own).
"""
