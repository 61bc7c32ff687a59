// FlowAWR (arXiv 2606.30376), one sample.
#pragma once

#include "math/loss.h"

struct AdvflowFlowAwr : AdvflowOfSamples {
  static constexpr int numbers = 2;  // kl_weight, policy_weight
  static constexpr int choices[ADVFLOW_LOSS_CHOICES] = {ADVFLOW_WEIGHTINGS, 0, 0};

  template <typename T>
  static ADVFLOW_HD void sample(const AdvflowLossRows<T>& rows, int64_t row, AdvflowSample<T>* sample) {
    const T E = sample->advantage, kl = rows.number(0, row), policy = rows.number(1, row);
    const T m = policy * advflow_sample_weight(rows.in.choices[0], rows.t(row), sample->stats);
    sample->coef[0] = m * E;
    sample->coef[1] = m * (T(1) - E);
    sample->coef[2] = kl;
    const T policy_term =
        m * (E * sample->stats[ADVFLOW_STAT_VU_SQ] +
             (T(1) - E) * (sample->stats[ADVFLOW_STAT_VO_SQ] - E * sample->stats[ADVFLOW_STAT_OU_SQ]));
    sample->means[0] = policy_term + kl * sample->stats[ADVFLOW_STAT_VP_SQ];
    sample->means[1] = policy_term;
    sample->extreme = m + kl;
    sample->finite &= kl >= T(0) && policy >= T(0);
  }
};
