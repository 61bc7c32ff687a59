"""yifan123/flow_grpo's ``sde_step_with_logprob`` in its versions, written anew from their conventions.

float32 throughout; the step of each timestep by the scheduler's own search; ``std_dev_t`` without the sqrt(-dt) of the
noise; log-probabilities averaged over elements, of CPS without the variance.
"""

from __future__ import annotations

import torch

from advflow_ext.conformance import rollout


def randn_tensor(shape, generator=None, device=None, dtype=None):
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def as_of_9745241(
    self,
    model_output,
    timestep,
    sample,
    noise_level=0.7,
    prev_sample=None,
    generator=None,
    sde_type="sde",
    return_sqrt_dt=False,
):
    returned = _step(self, model_output, timestep, sample, noise_level, prev_sample, generator, sde_type)
    return returned if return_sqrt_dt else returned[:4]


def as_of_3d02fd9(
    self, model_output, timestep, sample, noise_level=0.7, prev_sample=None, generator=None, sde_type="sde"
):
    return _step(self, model_output, timestep, sample, noise_level, prev_sample, generator, sde_type)[:4]


def as_of_ac4c86e(self, model_output, timestep, sample, noise_level=0.7, prev_sample=None, generator=None):
    return _step(self, model_output, timestep, sample, noise_level, prev_sample, generator, "sde")[:4]


def as_of_flow_cps(self, model_output, timestep, sample, noise_level=0.7, prev_sample=None, generator=None):
    return _step(self, model_output, timestep, sample, noise_level, prev_sample, generator, "cps")[:4]


def _step(self, model_output, timestep, sample, noise_level, prev_sample, generator, sde_type):
    v, x = model_output.float(), sample.float()
    places = [self.index_for_timestep(each) for each in timestep]
    shape = (-1, *[1] * (x.dim() - 1))
    s = self.sigmas[places].view(shape)
    following = self.sigmas[[place + 1 for place in places]].view(shape)
    sqrt_dt = (s - following).sqrt()
    if sde_type == "sde":
        mean, std_dev_t, _ = rollout.flow_sde_in_parts(v, x, s, following, noise_level, self.sigmas[1].item())
        std = std_dev_t * sqrt_dt
    else:
        mean, std = rollout.cps(v, x, s, following, noise_level)
        std_dev_t = std
    if prev_sample is None:
        prev_sample = mean + std * randn_tensor(v.shape, generator=generator, device=v.device, dtype=v.dtype)
    density = rollout.log_prob if sde_type == "sde" else rollout.log_prob_without_variance
    log_prob = density(prev_sample.float().detach(), (mean, std))
    return prev_sample.float(), log_prob, mean, std_dev_t, sqrt_dt
