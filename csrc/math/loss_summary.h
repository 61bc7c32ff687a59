// One sample of the scalar stage that ends every loss, shared by the CPU loop
// and the CUDA kernel: is the sample usable, what does it add to each metric.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"
#include "launchers.h"
#include "math/residual.h"

// The running sums of a batch, at fixed places whatever the loss reports.
enum AdvflowSummarySum : int {
  ADVFLOW_SUM_MEANS = 0,  // ADVFLOW_SUMMARY_MEANS of them
  ADVFLOW_SUM_STATS = ADVFLOW_SUM_MEANS + ADVFLOW_SUMMARY_MEANS,
  ADVFLOW_SUM_ADVANTAGE = ADVFLOW_SUM_STATS + ADVFLOW_SUMMARY_STATS,
  ADVFLOW_SUM_ABS_ADVANTAGE,
  ADVFLOW_SUM_FLAGGED,
  ADVFLOW_SUM_NONFINITE,
  ADVFLOW_SUM_INVALID,
  ADVFLOW_SUM_USABLE,
  ADVFLOW_SUMMARY_SUMS,
};

template <typename T>
ADVFLOW_HD T advflow_column_at(const AdvflowColumn& column, int64_t row) {
  return static_cast<const T*>(column.data)[row * column.stride];
}

template <typename T>
ADVFLOW_HD bool advflow_is_finite(T x) {
  return x - x == T(0);
}

// A sample is finite when every number it is made of is, also those whose
// weight is zero: one non-finite latent makes a statistic non-finite.
template <typename T>
ADVFLOW_HD bool advflow_sample_is_finite(const AdvflowLossSummaryInputs& in, int64_t row) {
  bool finite = advflow_is_finite(advflow_column_at<T>(in.advantages, row)) &&
                advflow_is_finite(advflow_column_at<T>(in.extreme, row));
  ADVFLOW_UNROLL
  for (int k = 0; k < ADVFLOW_SUMMARY_MEANS; ++k) {
    if (k < in.mean_count) finite &= advflow_is_finite(advflow_column_at<T>(in.means[k], row));
  }
  ADVFLOW_UNROLL
  for (int k = 0; k < ADVFLOW_SUMMARY_REQUIRED; ++k) {
    if (k < in.required_count) finite &= advflow_is_finite(advflow_column_at<T>(in.required[k], row));
  }
  ADVFLOW_UNROLL
  for (int k = 0; k < ADVFLOW_RESIDUAL_STATS; ++k) {
    finite &= advflow_is_finite(static_cast<const T*>(in.stats)[row * ADVFLOW_RESIDUAL_STATS + k]);
  }
  ADVFLOW_UNROLL
  for (int k = 0; k < 3; ++k) finite &= advflow_is_finite(static_cast<const T*>(in.coef)[row * 3 + k]);
  return finite;
}

// Where the search for the extreme begins: what is reported of an empty batch.
ADVFLOW_HD double advflow_extreme_identity(bool largest) { return largest ? 0.0 : HUGE_VAL; }

// Of two candidates; with `largest`, both are magnitudes.
ADVFLOW_HD double advflow_more_extreme(double a, double b, bool largest) { return (largest ? a > b : a < b) ? a : b; }

// Writes the sample's coefficients and, where asked for, its loss; adds it to
// the sums.
template <typename T>
ADVFLOW_HD void advflow_summarise_sample(const AdvflowLossSummaryInputs& in, int64_t row, T* loss, T* coef,
                                         double* sums, double* extreme) {
  const bool finite = advflow_sample_is_finite<T>(in, row);
  const bool usable = finite && in.valid[row] != 0;
  sums[ADVFLOW_SUM_NONFINITE] += finite ? 0.0 : 1.0;
  sums[ADVFLOW_SUM_INVALID] += in.valid[row] != 0 ? 0.0 : 1.0;
  if (in.per_sample) loss[row] = usable ? advflow_column_at<T>(in.means[0], row) : T(0);
  ADVFLOW_UNROLL
  for (int k = 0; k < 3; ++k) {
    coef[row * 3 + k] = usable ? static_cast<const T*>(in.coef)[row * 3 + k] / T(in.divisor) : T(0);
  }
  if (!usable) return;

  sums[ADVFLOW_SUM_USABLE] += 1.0;
  sums[ADVFLOW_SUM_FLAGGED] += in.flagged[row] != 0 ? 1.0 : 0.0;
  ADVFLOW_UNROLL
  for (int k = 0; k < ADVFLOW_SUMMARY_MEANS; ++k) {
    if (k < in.mean_count) sums[ADVFLOW_SUM_MEANS + k] += double(advflow_column_at<T>(in.means[k], row));
  }
  ADVFLOW_UNROLL
  for (int k = 0; k < ADVFLOW_SUMMARY_STATS; ++k) {
    if (k < in.stat_count) {
      sums[ADVFLOW_SUM_STATS + k] += double(static_cast<const T*>(in.stats)[row * ADVFLOW_RESIDUAL_STATS + k]);
    }
  }
  const double advantage = double(advflow_column_at<T>(in.advantages, row));
  sums[ADVFLOW_SUM_ADVANTAGE] += advantage;
  sums[ADVFLOW_SUM_ABS_ADVANTAGE] += advantage < 0 ? -advantage : advantage;
  const double candidate = double(advflow_column_at<T>(in.extreme, row));
  *extreme = advflow_more_extreme(in.largest && candidate < 0 ? -candidate : candidate, *extreme, in.largest);
}

// Metric `place` of advflow_summary_metrics(in), from the sums of the batch.
ADVFLOW_HD double advflow_summary_metric(const AdvflowLossSummaryInputs& in, int place, const double* sums,
                                         double extreme) {
  const double usable = sums[ADVFLOW_SUM_USABLE] > 1.0 ? sums[ADVFLOW_SUM_USABLE] : 1.0;
  if (place < in.mean_count) return sums[ADVFLOW_SUM_MEANS + place] / usable;
  place -= in.mean_count;
  if (place < in.stat_count) return sums[ADVFLOW_SUM_STATS + place] / usable;
  place -= in.stat_count;
  if (place < 2) return sums[ADVFLOW_SUM_ADVANTAGE + place] / usable;
  return place == 2 ? extreme : sums[ADVFLOW_SUM_FLAGGED + place - 3];
}

ADVFLOW_HD int advflow_summary_metrics(const AdvflowLossSummaryInputs& in) { return in.mean_count + in.stat_count + 6; }
