"""Makes the helper modules of this folder importable (pytest imports test files without touching `sys.path`)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
