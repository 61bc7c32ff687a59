// What losses of the reverse process share: a surrogate turned into a loss, its gradient and metrics.
//
// A log-ratio is formed as its difference, linear <eps (v-v_old)> - quadratic <(v-v_old)^2>: two log-probabilities
// subtracted lose it in their rounding.
#pragma once

#include "math/loss.h"

// The first numbers and the first choice of each of them.
enum AdvflowTransitionNumber : int { ADVFLOW_NUMBER_KL_WEIGHT = 0, ADVFLOW_NUMBER_POLICY_WEIGHT = 1 };
enum AdvflowTimeWeight : int {
  ADVFLOW_TIME_INVERSE_DT = 0,
  ADVFLOW_TIME_NONE = 1,
  ADVFLOW_TIME_SIGMA = 2,
  ADVFLOW_TIME_INVERSE_KAPPA = 3,
  ADVFLOW_TIME_WEIGHTS = 4,
};
enum AdvflowKlConvention : int {
  ADVFLOW_KL_EXACT = 0,
  ADVFLOW_KL_DT = 1,
  ADVFLOW_KL_TWO_SIGMA_SQUARED = 2,
  ADVFLOW_KL_CONVENTIONS = 3,
};

// The policy term of a transition.
template <typename T>
struct AdvflowSurrogate {
  T linear, quadratic;  // of the log-ratio
  T log_ratio, ratio;
  T value;
  T slope;  // d value / d log_ratio
  bool masked;
};

template <typename T>
ADVFLOW_HD AdvflowSurrogate<T> advflow_surrogate_of(T linear, T quadratic, const T* stats) {
  using std::exp;
  AdvflowSurrogate<T> surrogate = {};
  surrogate.linear = linear;
  surrogate.quadratic = quadratic;
  surrogate.log_ratio = linear * stats[ADVFLOW_STAT_EPS_VO] - quadratic * stats[ADVFLOW_STAT_VO_SQ];
  surrogate.ratio = exp(surrogate.log_ratio);
  return surrogate;
}

template <typename T>
ADVFLOW_HD void advflow_finish_transition(const AdvflowLossRows<T>& rows, int64_t row, int kl_convention,
                                          const AdvflowSurrogate<T>& surrogate, AdvflowSample<T>* sample) {
  const AdvflowStep<T> step = rows.step(row);
  T kl_scale = rows.number(ADVFLOW_NUMBER_KL_WEIGHT, row), policy = rows.number(ADVFLOW_NUMBER_POLICY_WEIGHT, row);
  sample->finite &= kl_scale >= T(0) && policy >= T(0) && advflow_is_finite(surrogate.ratio);
  const int time_weight = rows.in.choices[0];
  if (time_weight == ADVFLOW_TIME_INVERSE_DT) policy = policy / -step.dt;
  if (time_weight == ADVFLOW_TIME_SIGMA) policy = policy * step.sigma;
  if (time_weight == ADVFLOW_TIME_INVERSE_KAPPA) policy = policy / (step.kappa < T(0) ? -step.kappa : step.kappa);
  if (kl_convention == ADVFLOW_KL_DT) kl_scale = kl_scale * -step.dt;
  if (kl_convention == ADVFLOW_KL_TWO_SIGMA_SQUARED) kl_scale = kl_scale * (T(2) * (step.sigma * step.sigma));

  const T half_kappa_sq = step.kappa * step.kappa / T(2);
  const T policy_term = policy * surrogate.value, slope = policy * surrogate.slope;
  const T kl_ref = half_kappa_sq * sample->stats[ADVFLOW_STAT_VP_SQ];
  sample->coef[0] = slope * surrogate.linear / T(2);
  sample->coef[1] = -slope * surrogate.quadratic;
  sample->coef[2] = kl_scale * half_kappa_sq;
  sample->means[0] = policy_term + kl_scale * kl_ref;
  sample->means[1] = policy_term;
  sample->means[2] = surrogate.value;
  sample->means[3] = surrogate.log_ratio;
  sample->means[4] = half_kappa_sq * sample->stats[ADVFLOW_STAT_VO_SQ];
  sample->means[5] = kl_ref;
  sample->extreme = sample->log_ratio = surrogate.log_ratio;
  sample->flagged = surrogate.masked;
}
