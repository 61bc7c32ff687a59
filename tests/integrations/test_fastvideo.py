"""What is DanceGRPO's and MixGRPO's alone: seven scripts with one function, Euler steps, a solver without our SDE."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from advflow_ext.integrations import dance_grpo, mix_grpo
from tests.integrations import named_steps
from tests.integrations.named_steps import NAMED, SIGMAS

SCRIPTS = ("flux", "flux_lora", "hunyuan", "qwenimage", "qwenimage_edit", "skyreels_i2v", "wan_2_1")


@pytest.fixture(autouse=True)
def put_back():
    yield
    dance_grpo.uninstall()
    mix_grpo.uninstall()


@pytest.fixture
def mix(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return named_steps.load_stand_in(monkeypatch, NAMED["MixGRPO"])


def script_of(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    return named_steps.load_stand_in(monkeypatch, NAMED["DanceGRPO"]._replace(module=name))


def test_a_script_that_runs_is_found(monkeypatch, capsys):
    main = script_of(monkeypatch, "__main__")
    theirs = main.flux_step
    dance_grpo.install()
    assert main.flux_step is not theirs
    assert capsys.readouterr().out == (
        "advflow_ext in DanceGRPO: flux_step of __main__ replaced; log-probabilities are float64, and a half-precision "
        "velocity is widened before it is multiplied, so that seeds give other trajectories than before.\n"
    )


def test_a_script_that_is_imported_later_is_replaced_by_another_call(monkeypatch, capsys):
    flux = script_of(monkeypatch, "fastvideo.train_grpo_flux")
    theirs = flux.flux_step
    dance_grpo.install()
    ours, _ = flux.flux_step, capsys.readouterr()
    wan = script_of(monkeypatch, "fastvideo.train_grpo_wan_2_1")
    dance_grpo.install()
    assert flux.flux_step is ours and wan.flux_step.__globals__ is ours.__globals__
    assert "of fastvideo.train_grpo_wan_2_1 replaced" in capsys.readouterr().out
    dance_grpo.uninstall()
    assert flux.flux_step is theirs and wan.flux_step.__globals__ is vars(wan)


def test_without_a_script():
    why = r"^DanceGRPO is not to be patched: no module that is imported defines flux_step; accepted is an install\(\)"
    with pytest.raises(ImportError, match=why):
        dance_grpo.install()


def test_a_flux_step_of_somebody_else_is_no_script(monkeypatch):
    script_of(monkeypatch, "somebody.else")
    test_without_a_script()


@pytest.mark.peers
@pytest.mark.parametrize("script", SCRIPTS)
def test_each_of_the_seven_scripts_has_the_function_we_know(script, monkeypatch):
    file = Path(os.environ["PEERS"]) / f"DanceGRPO/fastvideo/train_grpo_{script}.py"
    if not file.is_file():
        pytest.skip(f"there is no {file}")
    named_steps.load_function(monkeypatch, f"fastvideo.train_grpo_{script}", "flux_step", file)
    dance_grpo.install()
    assert dance_grpo._patch.replaces(sys.modules[f"fastvideo.train_grpo_{script}"], "flux_step")


def test_dance_grpo_without_log_probabilities(monkeypatch):
    script = script_of(monkeypatch, "fastvideo.train_grpo_flux")
    v, x = NAMED["DanceGRPO"].latents()
    calls = [(v, x, 0.3, SIGMAS, 4, None, False, sde) for sde in (False, True)]
    theirs = [script.flux_step(*call) for call in calls]
    dance_grpo.install()
    for call, expected in zip(calls, theirs, strict=True):
        torch.testing.assert_close(script.flux_step(*call), expected, rtol=2e-6, atol=2e-6)
    with pytest.raises(
        ValueError, match=r"^sde_solver is False and grpo True; accepted are both: DanceGRPO adds noise"
    ):
        script.flux_step(v, x, 0.3, SIGMAS, 4, None, True, False)


def test_mix_grpo_outside_its_window(mix):
    v, x = NAMED["MixGRPO"].latents()
    calls = [(mix, "flow_grpo_step", (v, x, 0.7, SIGMAS, 4, given, None, True)) for given in (None, x + 1)]
    calls.append((mix, "dance_grpo_step", (v, x, 0.3, SIGMAS, 4, None, True, False)))
    theirs = [getattr(module, name)(*given) for module, name, given in calls]
    mix_grpo.install()
    for (module, name, given), expected in zip(calls, theirs, strict=True):
        ours = getattr(module, name)(*given)
        assert ours[2].dtype == torch.float64
        for found, wanted in zip(ours, expected, strict=True):
            torch.testing.assert_close(found, wanted.to(found.dtype), rtol=2e-6, atol=2e-6)


def test_a_seed_draws_as_often_as_before(mix):
    """Theirs draws for an Euler step of Flow-GRPO's, and not for one of Dance's."""
    v, x = NAMED["MixGRPO"].latents()

    def after() -> list[float]:
        torch.manual_seed(0)
        mix.flow_grpo_step(v, x, 0.7, SIGMAS, 4, None, None, True)
        first = torch.rand(()).item()
        mix.dance_grpo_step(v, x, 0.3, SIGMAS, 4, None, True, False)
        mix.dance_grpo_step(v, x, 0.3, SIGMAS, 4, None, True, True)
        return [first, torch.rand(()).item()]

    theirs = after()
    mix_grpo.install()
    assert after() == theirs


def test_two_sources_of_a_next_latent_are_refused(mix):
    v, x = NAMED["MixGRPO"].latents()
    mix_grpo.install()
    with pytest.raises(ValueError, match=r"^prev_sample and generator are both given; accepted is one of them\.$"):
        mix.flow_grpo_step(v, x, 0.7, SIGMAS, 4, x, torch.Generator())


def test_the_sde_of_dpmsolver_is_refused_and_its_ode_stays(mix):
    given = (SimpleNamespace(), None, None, 7, [], SIGMAS)
    before = mix.dpm_step(*given)
    mix_grpo.install()
    assert mix.dpm_step(*given) == before == ("dpmsolver's own", 7, False)
    with pytest.raises(
        ValueError, match=r"^sde_solver is True; accepted is False while advflow_ext is installed in Mix"
    ):
        mix.dpm_step(*given, sde_solver=True)
    mix_grpo.uninstall()
    assert mix.dpm_step(*given, sde_solver=True) == ("dpmsolver's own", 7, True)


def test_all_or_none_of_mix_grpo(mix, monkeypatch):
    theirs, dpm = mix.flow_grpo_step, mix.dpm_step
    holder = ModuleType("a_script")
    holder.steps = [mix.dance_grpo_step]
    monkeypatch.setitem(sys.modules, "a_script", holder)
    with pytest.raises(
        RuntimeError, match=r"sampling_utils.dance_grpo_step is held by a list, out of reach, and nothing"
    ):
        mix_grpo.install()
    assert mix.flow_grpo_step is theirs and mix.dpm_step is dpm
