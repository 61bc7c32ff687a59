"""LlamaGen in the loop: so far that of the embedded world, whose captions it knows how to be told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from advflow.ar_world.evaluate import compare_with_real
from advflow.ar_world.world import POLICY_FILE, REFERENCE_FILE, TOKENIZER_FILE, condition, decode, load
from advflow.autoregressive.features import Extractor, VQFeatures
from advflow.autoregressive.llamagen import LlamaGen
from advflow.autoregressive.token_model import Text
from advflow.autoregressive.vq import VQModel
from advflow.data.prompt import Prompt
from advflow.models.family import FusedKernels, LoadedModel, RealImages
from advflow.samplers.tokens import Told
from advflow.settings.data import EMBEDDED
from advflow.settings.model import ModelConfig
from advflow.world.scene import IMAGE_SIZE, all_captions


class LlamaGenFamily:
    def check(self, config: ModelConfig) -> None:
        """Raises ValueError where there is no world in the folder, or one of other images is asked for."""
        folder = Path(config.pipeline)
        wanted = (POLICY_FILE, TOKENIZER_FILE, REFERENCE_FILE)
        if config.pipeline != EMBEDDED and not all((folder / name).is_file() for name in wanted):
            raise ValueError(
                f'model.pipeline is {config.pipeline!r}; accepted with model.family "llamagen": "{EMBEDDED}", or a '
                f"folder that `python -m advflow.ar_world` has written, with {', '.join(wanted)}"
            )
        if config.resolution != IMAGE_SIZE:
            raise ValueError(f'model.resolution is {config.resolution}; accepted with "llamagen": {IMAGE_SIZE}')

    def load(self, config: ModelConfig, device: torch.device) -> LoadedModel:
        world = load(None if config.pipeline == EMBEDDED else Path(config.pipeline))
        policy, tokenizer = world.policy.to(device), world.tokenizer.to(device)
        said_of_none = policy.unconditional(condition([_ANY], device))
        assert isinstance(said_of_none, Text)
        nothing = said_of_none.features.cpu()

        def encode(texts: Sequence[str]) -> Told:
            """An empty text says nothing, as in training."""
            said = condition([text or _ANY for text in texts])
            empty = torch.tensor([not text for text in texts])[:, None, None]
            return Told(Text(torch.where(empty, nothing, said.features).to(device), said.words.to(device)))

        extractor = VQFeatures(tokenizer)
        real = RealImages(extractor, world.reference, lambda images, prompts: _compared(images, prompts, extractor))
        return LoadedModel(policy, TokenImages(tokenizer, policy.tokens), encode, real=real)

    def fuse(self, transformer: LlamaGen) -> FusedKernels | None:
        return None

    def save(self, transformer: LlamaGen, adapter: str | None, folder: Path) -> None:
        """All weights under their published names, as `checkpoints.load_weights` reads them."""
        assert adapter is None
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in transformer.state_dict().items()}
        save_file(state, folder / POLICY_FILE)

    def blocks(self, transformer: LlamaGen) -> Iterable[torch.nn.Module]:
        return transformer.layers


class TokenImages:
    """Images as tokens, each of which one number in [0, 1) decides."""

    def __init__(self, tokenizer: VQModel, tokens: int) -> None:
        self._tokenizer, self._tokens = tokenizer, tokens

    def noise(self, count: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
        """Uniform, fp64 [count, T], drawn on the CPU so that every device starts from the same."""
        return torch.rand(count, self._tokens, generator=generator, dtype=torch.float64).to(device)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return decode(self._tokenizer, latents)


_CAPTIONS = {caption.text: caption for caption in all_captions()}
_ANY = next(iter(_CAPTIONS))  # in the place of a text that says nothing
_FEWEST = 4  # images: of each the third neighbour is looked at


def _compared(images: torch.Tensor, prompts: Sequence[Prompt], extractor: Extractor) -> dict[str, float]:
    """Nothing where a prompt is none of the world's, of which it is not known what scenes it stands for."""
    captions = [_CAPTIONS[prompt.text] for prompt in prompts if prompt.text in _CAPTIONS]
    if len(captions) < max(len(prompts), _FEWEST):
        return {}
    return compare_with_real(images, captions, extractor)._asdict()
