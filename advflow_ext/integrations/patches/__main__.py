"""``python -m advflow_ext.integrations.patches apply NAME PATH [--check]``."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from advflow_ext.integrations.patches import PATCHES, apply


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m advflow_ext.integrations.patches", description=__doc__)
    parser.add_argument("command", choices=["apply"])
    parser.add_argument("name", choices=PATCHES, help="which trainer's")
    parser.add_argument("path", type=Path, help="its checkout")
    parser.add_argument("--check", action="store_true", help="say whether it could be applied, and write nothing")
    given = parser.parse_args()
    try:
        patch = apply(given.name, given.path, check=given.check)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"{given.name}: {error}")
    done = "can be applied to" if given.check else "is applied to"
    print(f"{given.name} {done} {', '.join(str(given.path / file) for file in patch.files)}")
    print(patch.text.partition("\ndiff --git")[0])


if __name__ == "__main__":
    main()
