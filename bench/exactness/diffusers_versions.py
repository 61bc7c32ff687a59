"""Whether the patched transformer is the stock one in other versions of diffusers.

    pip install --no-deps --target old/0.31.0 diffusers==0.31.0
    python -m bench.exactness.diffusers_versions old/0.31.0 old/0.36.0

Each folder holds one version; without any, the installed one is tried. Where there is no GPU the kernels run in
Triton's interpreter. The exit status is 1 where a version fails.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys

LIMIT = 1e-5  # relative, of a small model in float32


def main(folders: list[str]) -> int:
    failed = False
    for folder in folders or [""]:
        paths = [path for path in (folder, os.getcwd(), os.environ.get("PYTHONPATH")) if path]
        settings = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "1"}
        code = "from bench.exactness.diffusers_versions import check; check()"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], env=settings, capture_output=True, text=True
        )
        failed |= done.returncode != 0
        print(folder or "installed", (done.stdout if not done.returncode else done.stderr).strip().splitlines()[-1])
    return int(failed)


def check() -> None:
    """Compares outputs and gradients, with all ops, with a block and an attention that keep theirs, checkpointed."""
    import diffusers
    import torch
    from diffusers.models.attention_processor import FusedJointAttnProcessor2_0

    import advflow_ext as af

    torch.manual_seed(0)
    stock = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=32,
        pooled_projection_dim=24,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    given: tuple[torch.Tensor, ...] = (
        torch.randn(2, 4, 8, 8),
        torch.randn(2, 5, 12),
        torch.randn(2, 24),
        torch.tensor([100.0, 700.0]),
    )
    if torch.cuda.is_available():
        stock, given = stock.cuda(), tuple(tensor.cuda() for tensor in given)

    def run(model: torch.nn.Module) -> list[torch.Tensor]:
        out = model(*given, return_dict=False)[0]
        out.square().sum().backward()
        return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    worst = 0.0
    for kept in (False, True):
        for checkpointed in (False, True):
            plain = copy.deepcopy(stock)
            if kept:
                plain.transformer_blocks[0].set_chunk_feed_forward(1, dim=0)
                plain.transformer_blocks[1].attn.set_processor(FusedJointAttnProcessor2_0())
                plain.transformer_blocks[1].attn.fuse_projections()
            if checkpointed:
                plain.enable_gradient_checkpointing()
            patched = copy.deepcopy(plain)
            patch = af.apply_to_sd3(patched)
            assert patch.replaced["gate"] == (2 if kept else 3), patch
            found, expected = run(patched), run(plain)
            assert len(found) == len(expected)
            errors = [((a - b).norm() / b.norm().clamp_min(1e-6)).item() for a, b in zip(found, expected, strict=True)]
            worst = max(worst, *errors)
    assert worst <= LIMIT, f"off by {worst:.3g}"
    print(f"diffusers {diffusers.__version__}: within {worst:.1e}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
