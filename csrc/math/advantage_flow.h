// AdvantageFlow (arXiv 2605.26013, eq. 5), one sample.
#pragma once

#include "math/loss.h"

struct AdvflowAdvantageFlow : AdvflowOfSamples {
  static constexpr int numbers = 3;                                                 // gamma, lam, beta
  static constexpr int choices[ADVFLOW_LOSS_CHOICES] = {ADVFLOW_WEIGHTINGS, 3, 0};  // weighting; gamma's form

  template <typename T>
  static ADVFLOW_HD void sample(const AdvflowLossRows<T>& rows, int64_t row, AdvflowSample<T>* sample) {
    const T A = sample->advantage, lam = rows.number(1, row), beta = rows.number(2, row);
    const int form = rows.in.choices[1];  // a number, 1 - A, beta (beta - A)
    const T gamma = form == 0 ? rows.number(0, row) : form == 1 ? T(1) - A : beta * (beta - A);
    const T m = advflow_sample_weight(rows.in.choices[0], rows.t(row), sample->stats);
    const T data = beta * A;
    sample->coef[0] = data * m;
    sample->coef[1] = gamma * m;
    sample->coef[2] = lam * m;
    const T policy_term = sample->coef[0] * sample->stats[ADVFLOW_STAT_VU_SQ];
    sample->means[0] = policy_term + sample->coef[1] * sample->stats[ADVFLOW_STAT_VO_SQ] +
                       sample->coef[2] * sample->stats[ADVFLOW_STAT_VP_SQ];
    sample->means[1] = policy_term;
    sample->extreme = data + gamma + lam;
    sample->flagged = sample->extreme <= T(0);
    sample->finite &= beta > T(0) && lam >= T(0);
  }
};
