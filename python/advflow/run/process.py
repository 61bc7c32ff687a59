"""The algorithm of a run in its process, and what adapts its settings; each is handed its own section."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from advflow.algorithms import make_algorithm
from advflow.control.entropy import EntropyControl
from advflow.control.gamma import GammaControl
from advflow.control.reference import ReferenceControl
from advflow.models.family import Images, Latents
from advflow.policies import Policies
from advflow.processes.forward import Draws, ForwardProcess
from advflow.processes.process import Process
from advflow.processes.reverse import ReverseProcess
from advflow.processes.reweighted import ReweightedProcess
from advflow.processes.tokens import TokenProcess
from advflow.samplers.sampling import Sampler
from advflow.settings.config import TrainConfig
from advflow.settings.methods import AdvantageFlowConfig
from advflow.settings.registry import STOCHASTIC_SAMPLERS


@dataclass(frozen=True)
class Made:
    """A process, and the controls of its method; None are those that it has no use for."""

    process: Process
    reference: ReferenceControl
    gamma: GammaControl | None = None
    entropy: EntropyControl | None = None


def make_process(config: TrainConfig, policies: Policies, images: Images, sampler: Sampler) -> Made:
    """What a run learns with; `sampler` draws the images of the forward process. Raises ValueError for bad settings."""
    algorithm = make_algorithm(config.algorithm, config.method)
    if config.process == "tokens":
        return _of_tokens(config, policies, algorithm)
    # Without a weight of the reference there is nothing to adapt; the reverse process has none that does.
    adapts = config.process == "forward" and algorithm.needs.reference
    reference = ReferenceControl(config.reference.target_deviation if adapts else None)
    gamma = None
    if isinstance(config.method, AdvantageFlowConfig) and config.method.gamma == "auto":
        gamma = GammaControl(config.method.target_move)
    latents = cast(Latents, images)  # which the settings see to
    sigmas = latents.sigmas(config.rollout.steps)
    if config.process == "forward":
        draws = Draws(config.draws, latents, sigmas, config.seed)
        forward = ForwardProcess(policies, algorithm, draws, sampler, sigmas, reference, gamma, config.optim)
        return Made(forward, reference, gamma)
    steps = STOCHASTIC_SAMPLERS.make(config.sde.sampler, config.section(STOCHASTIC_SAMPLERS, config.sde.sampler))
    kind = ReweightedProcess if config.sde.reweight else ReverseProcess
    reverse = kind(policies, algorithm, config.sde, steps, config.rollout, sigmas, config.optim, config.seed)
    return Made(reverse, reference, gamma)


def _of_tokens(config: TrainConfig, policies: Policies, algorithm: Any) -> Made:
    vocabulary = len(policies.transformer("learner").head_weight)
    entropy = EntropyControl(config.entropy, config.iterations, vocabulary)
    role = config.rollout.policy
    on_policy = role == "learner" or config.rollout_policy.rate == 0
    process = TokenProcess(
        policies, algorithm, entropy, config.optim, config.tokens.epochs, config.seed, role, on_policy
    )
    return Made(process, ReferenceControl(None), entropy=entropy)
