"""Makes the embedded autoregressive world's base from nothing: python -m advflow.ar_world --out FOLDER."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path

from advflow.ar_world.settings import ARPretrainSettings


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m advflow.ar_world", description=__doc__)
    parser.add_argument("--out", required=True, help="folder for the weights")
    for field in fields(ARPretrainSettings):
        kind = type(field.default)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=f"{field.default} if left out")
    given = vars(parser.parse_args())
    out = Path(given.pop("out"))
    try:
        settings = replace(ARPretrainSettings(), **given)
        from advflow.ar_world.pretrain import pretrain

        pretrain(out, settings)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
