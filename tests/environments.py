"""What the processes that tests start find in their environment."""

from __future__ import annotations

import os
from pathlib import Path

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
"""As a user's."""

SITE = str(Path(__file__).parent / "programs" / "site")
LEAN = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, (SITE, os.environ.get("PYTHONPATH"))))}
"""Lightning is imported at half the cost (`programs/site`)."""
