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
  ADVFLOW_SUM_CONTRAST,
  ADVFLOW_SUM_APPROX_KL,
  ADVFLOW_SUM_EXCESS,
  ADVFLOW_SUM_EXCESS_SQ,
  ADVFLOW_SUM_ABOVE,
  ADVFLOW_SUM_BELOW,
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

// Whether no element of the row's gradient can overflow its dtype: an element is at most sqrt(elements) times the root
// mean square.
template <typename T>
ADVFLOW_HD bool advflow_gradient_fits(const AdvflowLossSummaryInputs& in, int64_t row) {
  if (in.largest_gradient == 0.0) return true;
  const int columns[3] = {in.eps_first ? int(ADVFLOW_STAT_EPS_SQ) : int(ADVFLOW_STAT_VU_SQ), ADVFLOW_STAT_VO_SQ,
                          ADVFLOW_STAT_VP_SQ};
  double most = 0.0;
  ADVFLOW_UNROLL
  for (int k = 0; k < 3; ++k) {
    const double weight = double(static_cast<const T*>(in.coef)[row * 3 + k]);
    const double square = double(static_cast<const T*>(in.stats)[row * ADVFLOW_RESIDUAL_STATS + columns[k]]);
    most += (weight < 0 ? -weight : weight) * sqrt(square);
  }
  return most <= in.largest_gradient;
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
  if (in.ratio) finite &= advflow_is_finite(advflow_column_at<T>(in.log_ratio, row));
  return finite && advflow_gradient_fits<T>(in, row);
}

// The extremes of a batch, and what is reported of an empty one.
struct AdvflowSummaryExtremes {
  double extreme, lowest, highest;
};

ADVFLOW_HD AdvflowSummaryExtremes advflow_no_extremes(bool largest) {
  return {largest ? 0.0 : HUGE_VAL, HUGE_VAL, -HUGE_VAL};
}

// Of two candidates; with `largest`, both are magnitudes.
ADVFLOW_HD double advflow_more_extreme(double a, double b, bool largest) { return (largest ? a > b : a < b) ? a : b; }

ADVFLOW_HD AdvflowSummaryExtremes advflow_join_extremes(const AdvflowSummaryExtremes& a,
                                                        const AdvflowSummaryExtremes& b, bool largest) {
  return {advflow_more_extreme(a.extreme, b.extreme, largest), advflow_more_extreme(a.lowest, b.lowest, false),
          advflow_more_extreme(a.highest, b.highest, true)};
}

template <typename T>
ADVFLOW_HD void advflow_summarise_ratio(const AdvflowLossSummaryInputs& in, int64_t row, double* sums,
                                        AdvflowSummaryExtremes* extremes) {
  const T log_ratio = advflow_column_at<T>(in.log_ratio, row);
  // In double: of a ratio this near to 1 float32 has no digits left of r - 1 squared.
  const double x = log_ratio < T(80) ? double(log_ratio) : 80.0, excess = expm1(x);
  sums[ADVFLOW_SUM_APPROX_KL] += x * x / 2;
  sums[ADVFLOW_SUM_EXCESS] += excess;
  sums[ADVFLOW_SUM_EXCESS_SQ] += excess * excess;
  if (in.log_highest.data && log_ratio > advflow_column_at<T>(in.log_highest, row)) sums[ADVFLOW_SUM_ABOVE] += 1.0;
  if (in.log_lowest.data && log_ratio < advflow_column_at<T>(in.log_lowest, row)) sums[ADVFLOW_SUM_BELOW] += 1.0;
  extremes->lowest = advflow_more_extreme(x, extremes->lowest, false);
  extremes->highest = advflow_more_extreme(x, extremes->highest, true);
}

// Writes the sample's coefficients and, where asked for, its loss; adds it to
// the sums.
template <typename T>
ADVFLOW_HD void advflow_summarise_sample(const AdvflowLossSummaryInputs& in, int64_t row, T* loss, T* coef,
                                         double* sums, AdvflowSummaryExtremes* extremes) {
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
  extremes->extreme =
      advflow_more_extreme(in.largest && candidate < 0 ? -candidate : candidate, extremes->extreme, in.largest);
  if (in.contrast && static_cast<const T*>(in.stats)[row * ADVFLOW_RESIDUAL_STATS + ADVFLOW_STAT_VO_SQ] > T(0)) {
    sums[ADVFLOW_SUM_CONTRAST] += 1.0;
  }
  if (in.ratio) advflow_summarise_ratio<T>(in, row, sums, extremes);
}

ADVFLOW_HD double advflow_ratio_metric(int place, const double* sums, double usable,
                                       const AdvflowSummaryExtremes& extremes) {
  const double excess = sums[ADVFLOW_SUM_EXCESS] / usable;
  const double variance = sums[ADVFLOW_SUM_EXCESS_SQ] / usable - excess * excess;
  switch (place) {
    case 0:
      return sums[ADVFLOW_SUM_APPROX_KL] / usable;
    case 1:
      return 1.0 + excess;
    case 2:
      return variance > 0.0 ? sqrt(variance) : 0.0;
    case 3:
      return sums[ADVFLOW_SUM_USABLE] > 0.0 ? exp(extremes.lowest) : 1.0;
    case 4:
      return sums[ADVFLOW_SUM_USABLE] > 0.0 ? exp(extremes.highest) : 1.0;
    case 5:
      return sums[ADVFLOW_SUM_ABOVE] / usable;
    default:
      return sums[ADVFLOW_SUM_BELOW] / usable;
  }
}

// Metric `place` of advflow_summary_metrics(in), from the sums of the batch.
ADVFLOW_HD double advflow_summary_metric(const AdvflowLossSummaryInputs& in, int place, const double* sums,
                                         const AdvflowSummaryExtremes& extremes) {
  const double usable = sums[ADVFLOW_SUM_USABLE] > 1.0 ? sums[ADVFLOW_SUM_USABLE] : 1.0;
  if (place < in.mean_count) return sums[ADVFLOW_SUM_MEANS + place] / usable;
  place -= in.mean_count;
  if (place < in.stat_count) return sums[ADVFLOW_SUM_STATS + place] / usable;
  place -= in.stat_count;
  if (place < 2) return sums[ADVFLOW_SUM_ADVANTAGE + place] / usable;
  if (place == 2) return extremes.extreme;
  if (place < 6) return sums[ADVFLOW_SUM_FLAGGED + place - 3];
  place -= 6;
  if (in.contrast && place == 0) return sums[ADVFLOW_SUM_CONTRAST] / usable;
  place -= in.contrast ? 1 : 0;
  return advflow_ratio_metric(place, sums, usable, extremes);
}

ADVFLOW_HD int advflow_summary_metrics(const AdvflowLossSummaryInputs& in) {
  return in.mean_count + in.stat_count + 6 + (in.contrast ? 1 : 0) + (in.ratio ? ADVFLOW_SUMMARY_RATIO : 0);
}
