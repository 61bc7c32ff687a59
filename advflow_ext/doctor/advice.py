"""What is wrong, and what is worth knowing, each in a sentence that says what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from advflow_ext.doctor.selftest import Trial
from advflow_ext.doctor.trainers import Trainer
from advflow_ext.patches._diffusers import OLDEST_SD3

REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps ."


@dataclass(frozen=True)
class Advice:
    wrong: bool  # or only worth knowing
    sentence: str


def advice(facts: dict[str, Any], trainers: Sequence[Trainer], tried: Sequence[Trial]) -> list[Advice]:
    """What is wrong first."""
    wrong = [*of_the_build(facts), *of_the_ops(tried)]
    worth = [*of_the_machine(facts), *of_the_trainers(facts, trainers)]
    return [Advice(True, sentence) for sentence in wrong] + [Advice(False, sentence) for sentence in worth]


def of_the_build(facts: dict[str, Any]) -> Iterator[str]:
    build, devices = facts["build"], facts["devices"]
    if build["built"] is None:
        problem: str = build["problem"]
        yield problem
        return
    if devices and not build["built"]["cuda"]:
        yield (
            f"There is a {devices[0]['name']}, but only CPU kernels were built: the slower PyTorch reference serves "
            f"CUDA tensors. Reinstall where nvcc is found, as by 'ADVFLOW_CUDA=1 {REINSTALL}'."
        )
    for device in devices if build["built"]["cuda"] else ():
        if not device["served"]:
            architecture = device["architecture"]
            yield (
                f"The kernels were built for {', '.join(build['built']['architectures'])}, none of which runs on a "
                f"{device['name']} ({architecture}). Reinstall by 'TORCH_CUDA_ARCH_LIST={architecture[3:-1]}."
                f"{architecture[-1]} {REINSTALL}'."
            )
    if devices and facts["versions"]["triton"] is None:
        yield (
            "Triton is not installed, so the ops of a transformer block (advflow_ext.nn, apply_to_sd3) are the slower "
            "PyTorch reference: 'pip install triton', in the version this torch asks for."
        )


def of_the_ops(tried: Sequence[Trial]) -> Iterator[str]:
    failed = list(dict.fromkeys(f"{trial.op} on {trial.device} in {trial.dtype}" for trial in tried if not trial.right))
    if failed:
        yield (
            f"Wrong against the float64 reference: {', '.join(failed)}. Do not train with "
            f"{'it' if len(failed) == 1 else 'these'}; please report what 'advflow-doctor --json' prints."
        )


def of_the_machine(facts: dict[str, Any]) -> Iterator[str]:
    environment, devices, torch = facts["environment"], facts["devices"], facts["versions"]["torch"]
    if environment["nvidia_driver"] and not devices:
        yield (
            f"There is an NVIDIA driver, but torch {torch} sees no CUDA device: torch has no CUDA, the driver is older "
            "than its CUDA, or CUDA_VISIBLE_DEVICES hides it. Nothing of a GPU was tried."
        )
    if not devices and environment["variables"].get("OMP_WAIT_POLICY", "").lower() != "passive":
        yield (
            "OMP_WAIT_POLICY is not PASSIVE: waiting OpenMP threads spin, and where anything else wants the cores, CPU "
            "ops take many times as long. 'export OMP_WAIT_POLICY=PASSIVE' before Python starts."
        )
    cores, threads = environment["cores"], environment["threads"]
    if threads > cores:
        yield f"torch uses {threads} threads on {cores} cores: 'export OMP_NUM_THREADS={cores}' before Python starts."


def of_the_trainers(facts: dict[str, Any], trainers: Sequence[Trainer]) -> Iterator[str]:
    diffusers = facts["versions"]["diffusers"]
    numbers = re.match(r"(\d+)\.(\d+)", diffusers or "")
    if numbers is not None and (int(numbers[1]), int(numbers[2])) < OLDEST_SD3:
        oldest = ".".join(map(str, OLDEST_SD3))
        yield f"diffusers is {diffusers}; apply_to_sd3 takes {oldest} or newer: 'pip install \"diffusers>={oldest}\"'."
    for trainer in trainers:
        if trainer.state == "refused":
            yield f"advflow_ext.integrations.{trainer.name}.install() refuses what is here: {trainer.sentence}"
