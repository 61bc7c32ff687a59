"""What `advflow shapes` writes."""

from __future__ import annotations

from pathlib import Path

from advflow.shapes.prompts import held_out_prompts, training_prompts
from advflow.shapes.sheet import draw_sheet


def write_files(folder: Path, per_category: int, seed: int) -> None:
    """Prompts to train on, prompts held out from them, and a page of drawn examples."""
    for name, make in (("train", training_prompts), ("held_out", held_out_prompts)):
        lines = "".join(prompt.to_json() + "\n" for prompt in make(per_category, seed))
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    draw_sheet(seed).save(folder / "sheet.png", optimize=True)
