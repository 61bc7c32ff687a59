from __future__ import annotations

import sys
from pathlib import Path

# bench is a folder of the repository, not part of the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
