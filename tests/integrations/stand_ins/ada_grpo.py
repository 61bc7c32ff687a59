"""Where AdaGRPO meets flow_grpo and DanceGRPO, written anew from their conventions: statistics, sampler, step."""

from __future__ import annotations

import numpy as np
import torch


class PerPromptStatTracker:
    def __init__(self, global_std=False):
        self.global_std = global_std

    def update(self, prompts, rewards, type="grpo"):
        prompts, rewards = np.array(prompts), np.array(rewards, dtype=np.float64)
        advantages = np.zeros_like(rewards)
        for prompt in np.unique(prompts):
            group = rewards[prompts == prompt]
            if type == "sft":
                advantages[prompts == prompt] = (group == group.max()).astype(float)
            else:
                std = (rewards if self.global_std else group).std(axis=0) + 1e-4
                advantages[prompts == prompt] = (group - group.mean(axis=0)) / std
        return advantages


class DistributedKRepeatSampler:
    def __init__(self, dataset, batch_size, k, num_replicas, rank, seed=0):
        self.dataset, self.batch_size, self.k = dataset, batch_size, k
        self.num_replicas, self.rank, self.seed, self.epoch = num_replicas, rank, seed, 0
        self.m = num_replicas * batch_size // k

    def __iter__(self):
        while True:
            g = torch.Generator().manual_seed(self.seed + self.epoch)
            chosen = torch.randperm(len(self.dataset), generator=g)[: self.m].repeat_interleave(self.k)
            mixed = chosen[torch.randperm(len(chosen), generator=g)].tolist()
            yield mixed[self.rank * self.batch_size :][: self.batch_size]

    def set_epoch(self, epoch):
        self.epoch = epoch


def train_one_step(
    args, device, transformer, vae, reward_model, tokenizer, optimizer, lr_scheduler, loader, noise_scheduler,
    max_grad_norm, preprocess_val, ema_handler,
):  # fmt: skip
    states, pooled, text_ids, caption = next(loader)
    repeated = [each.repeat_interleave(args.num_generations, 0) for each in (states, pooled, text_ids)]
    caption = [text for text in caption for _ in range(args.num_generations)]
    sampled = sample_reference_model(
        args, device, transformer, vae, *repeated, reward_model, tokenizer, caption, preprocess_val
    )
    return sampled[0].sum().item(), 0.0


def sample_reference_model(
    args, device, transformer, vae, encoder_hidden_states, pooled_prompt_embeds, text_ids, reward_model, tokenizer,
    caption, preprocess_val,
):  # fmt: skip
    raise NotImplementedError
