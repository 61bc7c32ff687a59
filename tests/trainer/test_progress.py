"""Progress in a log is whole lines; the command without the extension is a sentence."""

from __future__ import annotations

import subprocess
import sys

import pytest
from advflow.core import progress

HIDDEN = "import sys; sys.modules['advflow_ext'] = None; sys.argv = ['/somewhere/bin/advflow', 'train']\n"
SENTENCE = (
    "advflow needs advflow_ext, which is not installed for this Python; install it with "
    "'pip install --no-build-isolation .' in the root of the repository."
)


@pytest.fixture
def clock(monkeypatch):
    """Stands still until a test moves it."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_now_and_then_and_no_carriage_return(clock, capsys):
    bar = progress.show_progress(range(100), desc="train")
    for i in bar:
        clock[0] += 1.0
        bar.set_postfix(reward=f"{i / 100:.3f}")
    said = capsys.readouterr().err
    assert "\r" not in said and "\x1b" not in said and said.endswith("\n")
    lines = said.splitlines()
    assert len(lines) == 10  # every tenth second, the last of which is the end
    assert lines[0] == "train:  10% 10/100 [00:10<01:30,  1.00it/s, reward=0.090]"
    assert lines[-1].startswith("train: 100% 100/100 [01:40<00:00,") and lines[-1].endswith("reward=0.990]")


def test_a_fast_loop_is_one_line_and_a_slow_one_a_line_a_step(clock, capsys):
    for _ in progress.show_progress(range(5000), desc="rendering", unit="image"):
        clock[0] += 0.001
    assert capsys.readouterr().err.splitlines() == ["rendering: 100% 5000/5000 [00:05<00:00, 1000.00image/s]"]
    for _ in progress.show_progress(range(3), desc="slow"):
        clock[0] += 60
    assert [line.split(" [")[0] for line in capsys.readouterr().err.splitlines()] == [
        "slow:  33% 1/3", "slow:  67% 2/3", "slow: 100% 3/3",
    ]  # fmt: skip


def test_a_resumed_run_counts_on_and_a_stopped_one_says_where(clock, capsys):
    bar = progress.show_progress(range(40, 100), initial=40, desc="train")
    for i in bar:
        clock[0] += 1.0
        if i == 44:
            break
    bar.close()
    bar.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train:  44% 44/100 [00:05<01:10")


def test_a_terminal_has_tqdms_bar(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = progress.show_progress(range(40, 100), initial=40, desc="train")
    assert isinstance(bar, progress.tqdm) and (bar.n, bar.total) == (40, 100)
    bar.close()


def test_the_command_without_the_extension_is_a_sentence():
    result = subprocess.run(
        [sys.executable, "-c", HIDDEN + "from advflow.cli import main; main()"], capture_output=True, text=True
    )
    assert (result.returncode, result.stderr.strip()) == (1, SENTENCE)


@pytest.mark.parametrize("module", ["advflow", "advflow.run.train", "advflow.settings.config", "advflow.cli"])
def test_an_import_without_the_extension_raises_the_sentence(module):
    code = f"{HIDDEN}sys.argv = ['mine.py']\ntry:\n    import {module}\nexcept ImportError as error:\n    print(error)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == SENTENCE
