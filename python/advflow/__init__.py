"""A thin training loop for rectified-flow image models on top of advflow_ext."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("advflow_ext") is None:
    _SENTENCE = (
        "advflow needs advflow_ext, which is not installed for this Python; install it with "
        "'pip install --no-build-isolation .' in the root of the repository."
    )
    # A command ends in the sentence alone; "-m" is what Python calls a module it is about to run.
    if sys.argv[0] == "-m" or Path(sys.argv[0]).name == "advflow":
        raise SystemExit(_SENTENCE)
    raise ImportError(_SENTENCE)
