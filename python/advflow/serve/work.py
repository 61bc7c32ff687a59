"""Who scores: threads with rewards of their own, that take requests one by one or some of them together."""

from __future__ import annotations

import math
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from advflow.data.prompt import Prompt
from advflow.rewards import CheckedReward
from advflow.rewards.wire import Scored
from advflow.serve.metrics import Metrics

Rewards = Mapping[str, CheckedReward]

# What says nothing about an image: the request is to be made again.
_NOT_THE_IMAGE = (MemoryError, OSError, torch.OutOfMemoryError, torch.AcceleratorError)


class Unavailable(Exception):
    """Why nothing can be scored now, in a sentence."""


@dataclass(eq=False)
class Job:
    """Images [B, 3, H, W] with their prompts, and what the rewards called `names` say of them."""

    images: torch.Tensor
    prompts: list[Prompt]
    names: tuple[str, ...]
    answer: Future[dict[str, Scored]] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)

    def fits(self, other: Job) -> bool:
        return self.names == other.names and self.images.shape[1:] == other.images.shape[1:]


class Workers:
    """Threads, one for each of `rewards`. With `wait` seconds, up to `batch` images of several jobs go together."""

    def __init__(self, rewards: list[Rewards], batch: int, wait: float, metrics: Metrics) -> None:
        self._batch, self._wait, self._metrics = batch, wait, metrics
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, args=(each,), daemon=True) for each in rewards]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        self._metrics.add("waiting_requests")
        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()

    def close(self, seconds: float) -> None:
        """Returns when the jobs that are there have been done, or so many seconds later."""
        until = time.monotonic() + seconds
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _work(self, rewards: Rewards) -> None:
        while jobs := self._next():
            try:
                answers = self._score(rewards, jobs)
            except Exception as error:
                for job in jobs:
                    job.answer.set_exception(error)
            else:
                for job, answer in zip(jobs, answers, strict=True):
                    job.answer.set_result(answer)

    def _next(self) -> list[Job]:
        """The jobs to do next, together; none when there will be no more."""
        taken: list[Job] = []
        with self._changed:
            while True:
                taken += self._fitting(taken)
                until = taken[0].since + self._wait if taken else math.inf
                full = sum(len(job.images) for job in taken) >= self._batch
                left = until - time.monotonic()
                if taken and (self._closed or full or left <= 0):
                    return taken
                if self._closed and not self._jobs:
                    return []
                self._changed.wait(left if taken else None)

    def _fitting(self, taken: list[Job]) -> list[Job]:
        """Takes from the queue what may be scored together with `taken`, the oldest job first where that is nothing."""
        found: list[Job] = []
        for job in list(self._jobs):
            together = taken + found
            room = self._batch - sum(len(each.images) for each in together)
            if together and (not self._wait or not job.fits(together[0]) or len(job.images) > room):
                continue
            self._jobs.remove(job)
            self._metrics.add("waiting_requests", -1)
            if job.answer.set_running_or_notify_cancel():  # else its client has gone
                found.append(job)
        return found

    def _score(self, rewards: Rewards, jobs: list[Job]) -> list[dict[str, Scored]]:
        began = time.monotonic()
        self._metrics.add("waiting_seconds_total", sum(began - job.since for job in jobs))
        images, prompts = torch.cat([job.images for job in jobs]), [each for job in jobs for each in job.prompts]
        whole = {name: self._timed(name, rewards[name], images, prompts) for name in jobs[0].names}
        answers, first = [], 0
        for job in jobs:
            rows = range(first, first + len(job.images))
            answers.append({name: _part(scored, rows) for name, scored in whole.items()})
            first = rows.stop
        return answers

    def _timed(self, name: str, reward: CheckedReward, images: torch.Tensor, prompts: list[Prompt]) -> Scored:
        began = time.monotonic()
        scored = score(reward, images, prompts)
        self._metrics.add("scoring_seconds_total", time.monotonic() - began, reward=name)
        self._metrics.add("batches_total", reward=name)
        self._metrics.add("images_total", len(prompts), reward=name)
        self._metrics.add("failed_images_total", len(scored.errors), reward=name)
        return scored


def score(reward: CheckedReward, images: torch.Tensor, prompts: list[Prompt]) -> Scored:
    """What `reward` says of images in [0, 1]; of those that are not, or that it raises for, the reason.

    Raises Unavailable where the fault is none of the images'.
    """
    usable = (images.amin((1, 2, 3)) >= 0) & (images.amax((1, 2, 3)) <= 1)  # false of NaN
    if not usable.all():
        if len(prompts) == 1:
            return _failed("its pixels are not all in [0, 1]")
        return _one_by_one(reward, images, prompts)
    try:
        scores = reward(images, prompts)
    except _NOT_THE_IMAGE as error:
        traceback.print_exc()
        raise Unavailable(f"{type(error).__name__}: {_line(error)}") from error
    except Exception as error:
        if len(prompts) == 1:
            traceback.print_exc()
            return _failed(f"{type(error).__name__}: {_line(error)}")
        print(f"a batch failed ({type(error).__name__}); its images are scored one by one", file=sys.stderr)
        return _one_by_one(reward, images, prompts)
    without = (~(scores.reward.isfinite() & scores.score.isfinite())).nonzero().flatten().tolist()
    return Scored(scores.reward.tolist(), scores.score.tolist(), dict.fromkeys(without, "no finite score"))


def _one_by_one(reward: CheckedReward, images: torch.Tensor, prompts: list[Prompt]) -> Scored:
    each = [score(reward, images[row : row + 1], prompts[row : row + 1]) for row in range(len(prompts))]
    errors = {row: part.errors[0] for row, part in enumerate(each) if part.errors}
    return Scored([part.reward[0] for part in each], [part.score[0] for part in each], errors)


def _failed(reason: str) -> Scored:
    return Scored([math.nan], [math.nan], {0: reason})


def _part(scored: Scored, rows: range) -> Scored:
    errors = {place - rows.start: why for place, why in scored.errors.items() if place in rows}
    return Scored(scored.reward[rows.start : rows.stop], scored.score[rows.start : rows.stop], errors)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
