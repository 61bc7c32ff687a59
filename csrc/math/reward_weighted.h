// Reward-weighted flow matching: ORW-CFM-W2, RWR and RAFT, one sample. The reward stands in the advantage's place.
#pragma once

#include "math/loss.h"

struct AdvflowRewardWeighted : AdvflowOfSamples {
  static constexpr int numbers = 4;                                // tau, kl_weight, policy_weight, group_size
  static constexpr int choices[ADVFLOW_LOSS_CHOICES] = {3, 0, 0};  // exp, linear, best

  template <typename T>
  static ADVFLOW_HD void sample(const AdvflowLossRows<T>& rows, int64_t row, AdvflowSample<T>* sample) {
    using std::exp;
    const T tau = rows.number(0, row), kl = rows.number(1, row), policy = rows.number(2, row);
    T weight = sample->advantage;
    if (rows.in.choices[0] == 0) weight = exp(tau * weight);
    if (rows.in.choices[0] == 2) weight = is_best(rows, row, weight) ? T(1) : T(0);
    weight = policy * weight;
    const T policy_term = weight * sample->stats[ADVFLOW_STAT_VU_SQ];
    sample->coef[0] = weight;
    sample->coef[1] = T(0);
    sample->coef[2] = kl;
    sample->means[0] = policy_term + kl * sample->stats[ADVFLOW_STAT_VP_SQ];
    sample->means[1] = policy_term;
    sample->extreme = weight + kl;
    sample->flagged = sample->extreme < T(0);
    sample->finite &= tau > T(0) && kl >= T(0) && policy >= T(0);
  }

 private:
  // Whether no reward of the group that is a number is larger.
  template <typename T>
  static ADVFLOW_HD bool is_best(const AdvflowLossRows<T>& rows, int64_t row, T reward) {
    const T size = rows.number(3, row);
    const int64_t group = size >= T(1) ? int64_t(size) : 1, first = row / group * group;
    for (int64_t other = first; other < first + group && other < rows.in.report.batch; ++other) {
      const T its = rows.advantage(other);
      if (advflow_is_finite(its) && its > reward) return false;
    }
    return true;
  }
};
