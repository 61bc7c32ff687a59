"""The diffs that ship: what they name is ours, what they add compiles and computes what the trainer's formula does."""

from __future__ import annotations

import ast
import codeop
import inspect
import re
import subprocess
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import advflow_ext as af
from advflow_ext.conformance.awm import awm_log_prob, awm_loss
from advflow_ext.conformance.diffusion_nft import diffusion_nft_loss
from advflow_ext.conformance.flow_grpo import flow_grpo_loss
from advflow_ext.conformance.rollout import Rollout, clipped, shifted_once, shifted_twice
from advflow_ext.conformance.rows import SOURCES, TRANSITIONS, Inputs
from advflow_ext.contract.outputs import TRANSITION_METRICS, forward_metrics
from advflow_ext.integrations import patches
from advflow_ext.integrations.patches import PATCHES, TrainerPatch, apply, trainer_patch

every_patch = pytest.mark.parametrize("name", PATCHES)


def hunks(text: str) -> list[list[str]]:
    """The lines of each hunk, with their signs."""
    _, *found = re.split(r"^@@ .*\n", text, flags=re.MULTILINE)
    return [hunk.partition("\ndiff --git")[0].splitlines() for hunk in found]


def added(hunk: list[str]) -> str:
    """What a hunk leaves behind, from its first added line to its last."""
    places = [place for place, line in enumerate(hunk) if line.startswith("+")]
    if not places:
        return ""
    kept = [line[1:] for line in hunk[places[0] : places[-1] + 1] if not line.startswith("-")]
    return textwrap.dedent("\n".join(kept)) + "\n"


def added_loss(name: str) -> str:
    """The one block that computes the loss."""
    (code,) = [code for hunk in hunks(trainer_patch(name).text) if "loss, metrics =" in (code := added(hunk))]
    return code


def calls(code: str) -> list[ast.Call]:
    """Of public names of ours, however much of the code around them is another's."""
    found = []
    for match in re.finditer(r"\baf\.\w+\(", code):
        end = next(end for end in range(match.end(), len(code) + 1) if _is_whole(code[match.start() : end]))
        found.append(ast.parse(code[match.start() : end], mode="eval").body)
    return found  # type: ignore[return-value]


def _is_whole(code: str) -> bool:
    try:
        ast.parse(code, mode="eval")
    except SyntaxError:
        return False
    return code.endswith(")")


@every_patch
def test_it_says_what_it_is_for(name: str) -> None:
    patch = trainer_patch(name)
    assert re.fullmatch(r"[0-9a-f]{40}", patch.commit) and patch.diff.stem == f"{name}-{patch.commit[:7]}"
    known = {source.lower() for source in SOURCES.values()} | {"yifan123/flow_grpo @ac4c86e"}
    assert f"{patch.repository} @{patch.commit[:7]}".lower() in known
    assert patch.files and patch.text.count("\ndiff --git ") == len(patch.files)
    head = patch.text.partition("\ndiff --git")[0]
    assert "\nMemory: " in head and max(map(len, head.splitlines())) <= 160


@every_patch
def test_it_quotes_no_more_than_it_changes(name: str) -> None:
    for hunk in hunks(trainer_patch(name).text):
        signs = "".join(line[:1] or " " for line in hunk).rstrip("\n")
        assert re.fullmatch(r" ?[+-].*[+-] ?|[+-]| ?[+-] ?", signs), signs


@every_patch
def test_what_it_adds_compiles_and_calls_what_there_is(name: str) -> None:
    codes = [added(hunk) for hunk in hunks(trainer_patch(name).text)]
    for code in codes:
        inside = "def main():\n" + textwrap.indent(code or "pass", "    ") + "\n"
        codeop.compile_command(inside, symbol="exec")  # None where the trainer's next line goes on, or a SyntaxError
    found = [call for code in codes for call in calls(code)]
    assert found
    for call in found:
        op = getattr(af, call.func.attr)
        assert call.func.attr in af.__all__
        options = {keyword.arg: keyword.value for keyword in call.keywords}
        inspect.signature(op).bind(*call.args, **options)


@every_patch
def test_the_metrics_that_it_logs_are_those_of_its_loss(name: str) -> None:
    ratio = name == "awm"
    known = TRANSITION_METRICS if name in ("flow_grpo", "dance_grpo") else forward_metrics(ratio=ratio)
    logged = set(re.findall(r"""(?:named|values\)\))\[['"](\w+)['"]\]""", "".join(map(added, hunks_of(name)))))
    assert logged and logged <= set(known)


def hunks_of(name: str) -> list[list[str]]:
    return hunks(trainer_patch(name).text)


INPUTS = Inputs()


def gradient_of(name: str, leaf: str, names: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The loss of the added block in float64, and its gradient."""
    names = {"torch": torch, "af": af, "info": defaultdict(list), **names}
    v = names[leaf] = INPUTS.v.clone().requires_grad_()
    exec(added_loss(name), names)
    return names["loss"].detach(), torch.autograd.grad(names["loss"], v)[0]


def assert_equal(ours: tuple[Tensor, Tensor], theirs: Any) -> None:
    v = INPUTS.v.clone().requires_grad_()
    loss = theirs(v)
    torch.testing.assert_close(ours, (loss.detach(), torch.autograd.grad(loss, v)[0]), rtol=1e-9, atol=1e-13)


def test_the_added_loss_of_diffusion_nft_is_its_formula() -> None:
    given, A = INPUTS, (2 * INPUTS.A).clamp(-5, 5)
    names = {
        "x0": given.x0, "noise": given.noise, "t": given.t, "advantages_clip": A, "old_prediction": given.v_old,
        "ref_forward_prediction": given.v_ref, "loss_terms": {},
        "config": SimpleNamespace(beta=0.1, train=SimpleNamespace(adv_clip_max=5, beta=0.01)),
    }  # fmt: skip
    ours = gradient_of("diffusion_nft", "forward_prediction", names)
    assert_equal(
        ours,
        lambda v: diffusion_nft_loss(
            v, given.x0, given.x_t, given.t, A, given.v_old, given.v_ref, beta=0.1, adv_clip_max=5.0, kl_weight=0.01
        ),
    )
    assert set(names["loss_terms"]) == {"policy_loss", "unweighted_policy_loss", "kl_div_loss", "kl_div"}


@pytest.mark.parametrize(("weighting", "ours"), [("ghuber", "ghuber"), ("t**2", "t2"), ("Uniform", "uniform")])
@pytest.mark.parametrize("off_policy", [False, True])
def test_the_added_loss_of_awm_is_its_formula(weighting: str, ours: str, off_policy: bool) -> None:
    given, draws = INPUTS, 2
    images = given.A[: TRANSITIONS // draws]
    at = given.v_old if off_policy else given.v
    old = awm_log_prob(at, given.x0, given.noise, given.t, ours)
    settings: dict[str, Any] = {
        "loss_type": "exp_first",
        "kl_weight": "Uniform",
        "kl_ema_weight": "Uniform",
        "weighting": weighting,
    }
    settings |= {"ghuber_power": 0.25, "clip_range": 0.01, "ema_beta": 1.0, "beta": 3e-3}
    names = {
        "advantages": images, "std_dev_t": given.t.view(-1, 1, 1, 1), "timesteps": given.t.view(-1, 1, 1, 1),
        "model_output_ema": given.v_ema, "model_output_ref": given.v_ref,
        "config": SimpleNamespace(train=SimpleNamespace(**settings)),
        "sample": {
            "log_probs": old.view(draws, -1), "old_log_probs": old.view(draws, -1), "clean_latents": given.x0,
            "train_random_noise": given.noise,
        },
    }  # fmt: skip
    assert_equal(
        gradient_of("awm", "model_output", names),
        lambda v: awm_loss(
            v, given.x0, given.noise, given.t, images.repeat(draws), given.v_ema, given.v_ref, 0.01, 1.0, 3e-3, ours,
            old if off_policy else None,
        ),
    )  # fmt: skip


def transitions(at: Rollout) -> dict[str, Any]:
    """As the patched samplers store them, in the column of their step."""
    stored = torch.stack([INPUTS.v_old, at.drawn.eps], dim=1)
    return {"sample": {"log_probs": stored[:, None].expand(-1, 10, *stored.shape[1:])}, "table": at.table}


def test_the_added_loss_of_flow_grpo_is_its_formula() -> None:
    at = Rollout("flow_grpo", INPUTS, "flow_sde", 0.7, shifted_twice(10), torch.full((TRANSITIONS,), 4))
    settings = SimpleNamespace(clip_range=1e-4, beta=0.04)
    names = {"v_ref": INPUTS.v_ref, "advantages": INPUTS.A, "config": SimpleNamespace(train=settings), "j": 4}
    assert_equal(
        gradient_of("flow_grpo", "v", names | transitions(at)),
        lambda v: flow_grpo_loss(
            at.step_in_parts, v, INPUTS.v_ref, at.x_next, at.log_prob_old(), INPUTS.A, clip=1e-4, kl_weight=0.04
        ),
    )


def test_the_added_loss_of_dance_grpo_is_its_formula() -> None:
    at = Rollout("DanceGRPO", INPUTS, "dance_sde", 0.3, shifted_once(16), torch.full((TRANSITIONS,), 4))
    names = {"advantages": INPUTS.A, "clip_range": 1e-4, "perms": torch.tensor([[4]]), "i": 0, "_": 0}
    names |= {"args": SimpleNamespace(gradient_accumulation_steps=3), "train_timesteps": 5}
    assert_equal(
        gradient_of("dance_grpo", "v", names | transitions(at)),
        lambda v: clipped(at.log_ratio(v).exp(), INPUTS.A, 1e-4) / 15,
    )


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A trainer of one line in two files, and a patch for it, inside another repository that knows nothing of it."""

    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout

    folder = tmp_path / "other" / "trainer"
    (folder / "scripts").mkdir(parents=True)
    (folder / "scripts" / "train.py").write_text("loss = theirs()\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "theirs")
    (folder / "scripts" / "train.py").write_text("loss = ours()\n")
    head = f"Ours.\n\nRepository: a/trainer\nCommit: {git('rev-parse', 'HEAD')}\n"
    diff = tmp_path / "trainer-0000000.patch"
    diff.write_text(head + git("diff", "-U1", "--full-index"))
    git("checkout", "-q", "--", ".")
    subprocess.run(["git", "init", "-q"], cwd=folder.parent, check=True)
    monkeypatch.setitem(PATCHES, "trainer", diff)
    return folder


def content(checkout: Path) -> str:
    return (checkout / "scripts" / "train.py").read_text()


@pytest.mark.parametrize("repository", [True, False])
def test_a_patch_is_checked_and_applied_with_or_without_a_repository(checkout: Path, repository: bool) -> None:
    if not repository:
        (checkout / ".git").rename(checkout.parent / "elsewhere")
    assert isinstance(apply("trainer", checkout, check=True), TrainerPatch) and content(checkout) == "loss = theirs()\n"
    apply("trainer", checkout)
    assert content(checkout) == "loss = ours()\n"


def test_a_patch_is_refused_in_a_sentence(checkout: Path) -> None:
    with pytest.raises(ValueError, match=r"name is 'nft'; accepted are awm, dance_grpo, diffusion_nft, flow_grpo"):
        trainer_patch("nft")
    with pytest.raises(ValueError, match=r"has no scripts/train\.py; accepted is a checkout of a/trainer"):
        apply("trainer", checkout / "scripts")
    (checkout / "scripts" / "train.py").write_text("loss = theirs() + mine()\n")
    with pytest.raises(ValueError, match=r"is not that of a/trainer at \w{7}; accepted is .*`git checkout \w{7} -- s"):
        apply("trainer", checkout)
    assert content(checkout) == "loss = theirs() + mine()\n"
    (checkout / "scripts" / "train.py").write_text("loss = ours()\n")
    with pytest.raises(ValueError, match=r"has this patch already; `git apply -R .*trainer-0000000\.patch` takes it"):
        apply("trainer", checkout)


def test_the_command_says_what_was_done_or_why_not(tmp_path: Path) -> None:
    command = [sys.executable, "-m", patches.__name__, "apply", "awm", str(tmp_path), "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip().endswith("accepted is a checkout of scxue/advantage_weighted_matching.")
