// Flow-GRPO (arXiv 2505.05470), and Flow-CPS and GRPO-Guard with their own ratios, one transition.
#pragma once

#include "math/transition_loss.h"

struct AdvflowFlowGrpo : AdvflowOfTransitions {
  static constexpr int numbers = 4;  // kl_weight, policy_weight, how far the ratio may go below and above 1
  // time_weight; kl_convention; the ratio: Flow-GRPO's, Flow-CPS's, GRPO-Guard's
  static constexpr int choices[ADVFLOW_LOSS_CHOICES] = {ADVFLOW_TIME_WEIGHTS, ADVFLOW_KL_CONVENTIONS, 3};

  template <typename T>
  static ADVFLOW_HD void sample(const AdvflowLossRows<T>& rows, int64_t row, AdvflowSample<T>* sample) {
    const AdvflowStep<T> step = rows.step(row);
    T linear = step.kappa, quadratic = step.kappa * step.kappa / T(2);
    if (rows.in.choices[2] == 1) linear = T(2) * step.sigma * step.c_v, quadratic = step.c_v * step.c_v;
    if (rows.in.choices[2] == 2) linear = step.c_v, quadratic = T(0);
    AdvflowSurrogate<T> surrogate = advflow_surrogate_of(linear, quadratic, sample->stats);

    // max(-A r, -A clip(r, 1 - below, 1 + above)); a ratio on the bound still has its gradient. Decided on logarithms,
    // before the exponential, where float32 still tells 2e-6 from 0.
    const T A = sample->advantage, below = rows.number(2, row), above = rows.number(3, row);
    sample->finite &= below >= T(0) && below < T(1) && above >= T(0);
    sample->above = surrogate.log_ratio > T(log1p(rows.exact_number(3, row)));
    sample->below = surrogate.log_ratio < T(log1p(-rows.exact_number(2, row)));
    surrogate.masked = (A > T(0) && sample->above) || (A < T(0) && sample->below);
    const T unclipped = -A * surrogate.ratio, size = A < T(0) ? -A : A;
    surrogate.value = surrogate.masked ? -A - (A > T(0) ? above : below) * size : unclipped;
    surrogate.slope = surrogate.masked ? T(0) : unclipped;
    advflow_finish_transition(rows, row, rows.in.choices[1], surrogate, sample);
  }
};
