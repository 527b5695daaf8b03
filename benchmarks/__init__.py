"""The benchmarks, one folder each: ``python -m benchmarks.NAME`` from the repository's root; see ``README.md``.

What several of them need is in :mod:`benchmarks.shared`, their rows and pictures in ``results/``. A benchmark imports
from its own folder, from ``shared``, and from the examples, whose modules go by their bare names, as in an example;
``scale`` also knows the schemes of ``network``, against whose rows it checks its model, and ``text`` takes the time of
an all-reduce from ``scale``.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
RESULTS = ROOT / "benchmarks" / "results"

sys.path.insert(0, str(EXAMPLES))
