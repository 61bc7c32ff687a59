"""Whether the patched transformers are the stock ones in other versions of diffusers.

    pip install --no-deps --target old/0.31.0 diffusers==0.31.0
    python -m bench.exactness.diffusers_versions old/0.31.0 old/0.36.0

Each folder holds one version; without any, the installed one is tried. Where there is no GPU the kernels run in
Triton's interpreter. A family that a version is too old for must be refused. The exit status is 1 where one fails.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

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
    """Of every family: outputs and gradients with all ops, and checkpointed; of SD3 also with what keeps its own."""
    import diffusers
    import torch

    import advflow_ext as af
    from advflow_ext.patches._diffusers import OLDEST_FLUX, OLDEST_QWEN_IMAGE, OLDEST_SD3

    torch.manual_seed(0)
    installed = tuple(map(int, diffusers.__version__.split(".")[:2]))
    families = {
        "SD3": (OLDEST_SD3, _sd3, af.apply_to_sd3),
        "FLUX.1": (OLDEST_FLUX, _flux, af.apply_to_flux),
        "Qwen-Image": (OLDEST_QWEN_IMAGE, _qwen_image, af.apply_to_qwen_image),
    }
    said = []
    for name, (oldest, cases, apply) in families.items():
        if installed < oldest:
            try:
                apply(torch.nn.Linear(1, 1))
            except ImportError:
                said.append(f"{name} refused")
                continue
            raise AssertionError(f"{name} is not refused")
        worst = 0.0
        for plain, given, kept in cases():
            plain = plain.cuda() if torch.cuda.is_available() else plain
            for checkpointed in (False, True):
                if checkpointed:
                    plain.enable_gradient_checkpointing()
                patched = copy.deepcopy(plain)
                patch = apply(patched)
                assert len(patch.kept) == kept, patch
                worst = max(worst, *_errors(patched, plain, given))
        assert worst <= LIMIT, f"{name} is off by {worst:.3g}"
        said.append(f"{name} within {worst:.1e}")
    print(f"diffusers {diffusers.__version__}: {', '.join(said)}")


def _errors(patched: Any, plain: Any, given: dict[str, Any]) -> list[float]:
    import torch

    def run(model: Any) -> list[Any]:
        device = next(model.parameters()).device
        there = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
        out = model(**there, return_dict=False)[0]
        out.square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        return [out.detach(), *grads]

    found, expected = run(patched), run(plain)
    assert len(found) == len(expected)
    return [((a - b).norm() / b.norm().clamp_min(1e-6)).item() for a, b in zip(found, expected, strict=True)]


Cases = Iterator[tuple[Any, dict[str, Any], int]]  # a model, what it is given, and how many of its parts are kept


def _sd3() -> Cases:
    import torch
    from diffusers import SD3Transformer2DModel
    from diffusers.models.attention_processor import FusedJointAttnProcessor2_0

    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 8}
    widths = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 12}
    widths |= {"caption_projection_dim": 32, "pooled_projection_dim": 24}
    model = SD3Transformer2DModel(**sizes, **widths, num_layers=3, dual_attention_layers=(0,), qk_norm="rms_norm")
    given = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "pooled_projections": torch.randn(2, 24),
        "timestep": torch.tensor([100.0, 700.0]),
    }
    yield copy.deepcopy(model), given, 0
    model.transformer_blocks[0].set_chunk_feed_forward(1, dim=0)
    model.transformer_blocks[1].attn.set_processor(FusedJointAttnProcessor2_0())
    model.transformer_blocks[1].attn.fuse_projections()
    yield model, given, 2


def _flux() -> Cases:
    import torch
    from diffusers import FluxTransformer2DModel

    widths: Any = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 12}
    model = FluxTransformer2DModel(
        **widths, in_channels=4, num_layers=2, num_single_layers=2, pooled_projection_dim=24, axes_dims_rope=(4, 6, 6)
    )
    yield (
        model,
        {
            "hidden_states": torch.randn(2, 6, 4),
            "encoder_hidden_states": torch.randn(2, 5, 12),
            "pooled_projections": torch.randn(2, 24),
            "timestep": torch.tensor([0.1, 0.7]),
            "img_ids": torch.arange(18.0).view(6, 3),
            "txt_ids": torch.zeros(5, 3),
        },
        0,
    )


def _qwen_image() -> Cases:
    import torch
    from diffusers import QwenImageTransformer2DModel

    widths: Any = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 12}
    model = QwenImageTransformer2DModel(**widths, in_channels=4, out_channels=1, num_layers=2, axes_dims_rope=(4, 6, 6))
    given = {
        "hidden_states": torch.randn(2, 6, 4),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "timestep": torch.tensor([0.1, 0.7]),
        "img_shapes": [[(1, 2, 3)]] * 2,
    }
    yield model, given | {"encoder_hidden_states_mask": None}, 0
    yield copy.deepcopy(model), given | {"encoder_hidden_states_mask": torch.tensor([[1] * 5, [1] * 3 + [0] * 2])}, 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
