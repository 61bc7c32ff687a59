// Flow-DPPO (arXiv 2606.11025), one transition.
#pragma once

#include "math/transition_loss.h"

struct AdvflowFlowDppo : AdvflowOfTransitions {
  static constexpr int numbers = 4;  // kl_weight, policy_weight, threshold, step_size
  // time_weight; direction: ratio, log_ratio_minus_kl; mask: current, predictive
  static constexpr int choices[ADVFLOW_LOSS_CHOICES] = {ADVFLOW_TIME_WEIGHTS, 2, 2};

  template <typename T>
  static ADVFLOW_HD void sample(const AdvflowLossRows<T>& rows, int64_t row, AdvflowSample<T>* sample) {
    const AdvflowStep<T> step = rows.step(row);
    const T A = sample->advantage, threshold = rows.number(2, row), size = rows.number(3, row);
    const T quadratic = step.kappa * step.kappa / T(2);
    AdvflowSurrogate<T> surrogate = advflow_surrogate_of(step.kappa, quadratic, sample->stats);
    const T log_ratio = surrogate.log_ratio, kl = quadratic * sample->stats[ADVFLOW_STAT_VO_SQ];
    const T heading = rows.in.choices[1] ? log_ratio - kl : log_ratio;
    const bool leaving = (A > T(0) && heading > T(0)) || (A < T(0) && heading < T(0));
    T reach = kl;
    sample->finite &= threshold >= T(0);
    if (rows.in.choices[2]) {
      sample->finite &= size > T(0);
      const T change = size * A * surrogate.ratio / (step.sigma * step.sigma);
      // <(x' - mean)^2> / sigma^2
      const T distance =
          sample->stats[ADVFLOW_STAT_EPS_SQ] - T(2) * step.kappa * sample->stats[ADVFLOW_STAT_EPS_VO] + T(2) * kl;
      reach = kl + change * (log_ratio - kl) + change * change / T(2) * distance;
    }
    surrogate.masked = leaving && !(reach < threshold);  // an overflow to NaN is far too
    surrogate.value = surrogate.slope = surrogate.masked ? T(0) : -A * surrogate.ratio;
    advflow_finish_transition(rows, row, ADVFLOW_KL_EXACT, surrogate, sample);
  }
};
