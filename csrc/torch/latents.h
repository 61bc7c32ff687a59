// The latents of one call, checked: what every operator of the loss core begins with.
#pragma once

#include "launchers.h"
#include "operands.h"

struct AdvflowLatents {
  static AdvflowLatents of_samples(const at::Tensor& v, const at::Tensor& target,
                                   const std::optional<at::Tensor>& noise, const std::optional<at::Tensor>& v_old,
                                   const std::optional<at::Tensor>& v_ref, const char* target_name = "target") {
    AdvflowLatents latents(v, target, noise, v_old, v_ref);
    latents.operands.check(target, target_name);
    latents.operands.check_if_given(noise, "noise");
    latents.operands.check_if_given(v_old, "v_old");
    latents.operands.check_if_given(v_ref, "v_ref");
    return latents;
  }

  static AdvflowLatents of_transitions(const at::Tensor& v, const at::Tensor& eps, const at::Tensor& v_old,
                                       const std::optional<at::Tensor>& v_ref) {
    AdvflowLatents latents(v, eps, std::nullopt, v_old, v_ref);
    latents.are_transitions = true;
    latents.operands.check(eps, "eps");
    latents.operands.check(v_old, "v_old");
    latents.operands.check_if_given(v_ref, "v_ref");
    return latents;
  }

  AdvflowResidualInputs read(AdvflowReader& reader) const {
    AdvflowResidualInputs in = {};
    in.v = reader.rows(v);
    in.target = reader.rows(target);
    in.noise = reader.rows(noise);
    in.v_old = reader.rows(v_old);
    in.v_ref = reader.rows(v_ref);
    in.batch = operands.batch();
    in.elements = operands.elements();
    in.target_is = are_transitions ? ADVFLOW_TARGET_EPS : in.noise.data ? ADVFLOW_TARGET_X0 : ADVFLOW_TARGET_U;
    return in;
  }

  const at::Tensor& v;
  const at::Tensor& target;
  std::optional<at::Tensor> noise, v_old, v_ref;
  AdvflowOperands operands;
  bool are_transitions = false;

 private:
  AdvflowLatents(const at::Tensor& v_, const at::Tensor& target_, const std::optional<at::Tensor>& noise_,
                 const std::optional<at::Tensor>& v_old_, const std::optional<at::Tensor>& v_ref_)
      : v(v_), target(target_), noise(noise_), v_old(v_old_), v_ref(v_ref_), operands(v_) {}
};
