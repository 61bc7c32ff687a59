// DiffusionNFT (arXiv 2509.16117) as released, one sample.
#pragma once

#include "math/loss.h"

struct AdvflowDiffusionNft : AdvflowOfSamples {
  static constexpr int numbers = 4;                                // beta, adv_clip_max, kl_weight, policy_weight
  static constexpr int choices[ADVFLOW_LOSS_CHOICES] = {5, 2, 0};  // all, positive, negative, one, binary; adaptive
  static constexpr int mix = 0, mixed_when = 1;

  template <typename T>
  static ADVFLOW_HD void sample(const AdvflowLossRows<T>& rows, int64_t row, AdvflowSample<T>* sample) {
    const T beta = rows.number(0, row), clip = rows.number(1, row);
    const T kl = rows.number(2, row), policy = rows.number(3, row);
    const T t = rows.t(row), signal = signal_of(rows.in.choices[0], sample->advantage, clip);
    T inverse_plus = T(1), inverse_minus = T(1);
    if (rows.in.choices[1]) {
      inverse_plus = T(1) / advflow_scale_of(t, sample->stats[ADVFLOW_STAT_PLUS_ABS]);
      inverse_minus = T(1) / advflow_scale_of(t, sample->stats[ADVFLOW_STAT_MINUS_ABS]);
    }
    const T plus = (T(1) + signal) / T(2) * inverse_plus, minus = (T(1) - signal) / T(2) * inverse_minus;
    // Not plus - minus: at the first step (w+ = w-) that would lose the digits of a small advantage.
    const T difference = (inverse_plus - inverse_minus + signal * (inverse_plus + inverse_minus)) / T(2);
    const T m = policy * clip * (t * t);
    const T z = m * ((T(1) / beta - T(1)) * plus + (T(1) / beta + T(1)) * minus);
    sample->coef[0] = m * difference;
    sample->coef[1] = m * ((beta - T(1)) * plus + (beta + T(1)) * minus);
    sample->coef[2] = kl;
    const T policy_term = sample->coef[0] * sample->stats[ADVFLOW_STAT_VU_SQ] +
                          sample->coef[1] * sample->stats[ADVFLOW_STAT_VO_SQ] + z * sample->stats[ADVFLOW_STAT_OU_SQ];
    sample->means[0] = policy_term + kl * sample->stats[ADVFLOW_STAT_VP_SQ];
    sample->means[1] = policy_term;
    sample->extreme = m * beta * (plus + minus) + kl;
    sample->flagged = sample->extreme <= T(0);
    sample->finite &= beta > T(0) && clip > T(0) && kl >= T(0) && policy >= T(0);
  }

 private:
  // 2r - 1, in [-1, 1].
  template <typename T>
  static ADVFLOW_HD T signal_of(int mode, T advantage, T clip) {
    T clipped = advantage < -clip ? -clip : advantage > clip ? clip : advantage;
    if (mode == 1 && clipped < T(0)) clipped = T(0);
    if (mode == 2 && clipped > T(0)) clipped = T(0);
    if (mode == 3) clipped = clipped > T(0) ? T(1) : T(0);
    if (mode == 4) clipped = clipped > T(0) ? T(1) : clipped < T(0) ? T(-1) : T(0);
    const T signal = clipped / clip;
    return signal < T(-1) ? T(-1) : signal > T(1) ? T(1) : signal;
  }
};
