// The scalar stage that ends every loss, shared by the CPU loop and the CUDA
// kernels: is a sample usable, what does it add to each metric.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"
#include "launchers.h"
#include "math/residual.h"

// What the samples of a batch are joined into, at fixed places whatever the loss reports.
enum AdvflowSummaryPlace : int {
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
  // Largest ones. What is reported as smallest has its sign turned.
  ADVFLOW_MOST_EXTREME = ADVFLOW_SUMMARY_SUMS,
  ADVFLOW_MOST_LOW,
  ADVFLOW_MOST_HIGH,
  ADVFLOW_SUMMARY_PLACES,
};

// What every loss reports after its means, in this order; after it, where asked for, the contrast.
enum AdvflowMetric : int {
  ADVFLOW_METRIC_ADVANTAGE = 0,
  ADVFLOW_METRIC_ABS_ADVANTAGE,
  ADVFLOW_METRIC_EXTREME,
  ADVFLOW_METRIC_FLAGGED,
  ADVFLOW_METRIC_NONFINITE,
  ADVFLOW_METRIC_INVALID,
  ADVFLOW_METRICS_OF_ALL,
};

// Where a ratio is reported, last.
enum AdvflowRatioMetric : int {
  ADVFLOW_RATIO_APPROX_KL = 0,
  ADVFLOW_RATIO_MEAN,
  ADVFLOW_RATIO_STD,
  ADVFLOW_RATIO_MIN,
  ADVFLOW_RATIO_MAX,
  ADVFLOW_RATIO_ABOVE,
  ADVFLOW_RATIO_BELOW,
  ADVFLOW_METRICS_OF_RATIO,
};

// What a place holds when no sample has added to it, and two of its values as one.
ADVFLOW_HD double advflow_summary_none(int place, bool largest) {
  return place < ADVFLOW_SUMMARY_SUMS || (place == ADVFLOW_MOST_EXTREME && largest) ? 0.0 : -HUGE_VAL;
}

ADVFLOW_HD double advflow_summary_join(int place, double a, double b) {
  return place < ADVFLOW_SUMMARY_SUMS ? a + b : a > b ? a : b;
}

// What a loss says of one sample.
template <typename T>
struct AdvflowSample {
  const T* stats;  // ADVFLOW_RESIDUAL_STATS of them
  T coef[3];
  T means[ADVFLOW_SUMMARY_MEANS];  // so many as the report has; the first is the loss
  T advantage;
  T extreme;
  T log_ratio;
  bool above, below;  // the clip of the ratio
  bool valid;
  bool flagged;
  bool finite;  // whatever else the sample is made of is a finite number
};

template <typename T>
ADVFLOW_HD bool advflow_is_finite(T x) {
  return x - x == T(0);
}

// Whether no element of the row's gradient can overflow its dtype: an element is at most sqrt(elements) times the root
// mean square.
template <typename T>
ADVFLOW_HD bool advflow_gradient_fits(const AdvflowReport& report, const AdvflowSample<T>& sample) {
  if (report.largest_gradient == 0.0) return true;
  const int columns[3] = {report.eps_first ? int(ADVFLOW_STAT_EPS_SQ) : int(ADVFLOW_STAT_VU_SQ), ADVFLOW_STAT_VO_SQ,
                          ADVFLOW_STAT_VP_SQ};
  double most = 0.0;
  ADVFLOW_UNROLL
  for (int k = 0; k < 3; ++k) {
    const double weight = double(sample.coef[k]);
    most += (weight < 0 ? -weight : weight) * sqrt(double(sample.stats[columns[k]]));
  }
  return most <= report.largest_gradient;
}

// A sample is finite when every number it is made of is, also those whose
// weight is zero: one non-finite latent makes a statistic non-finite.
template <typename T>
ADVFLOW_HD bool advflow_sample_is_finite(const AdvflowReport& report, const AdvflowSample<T>& sample) {
  bool finite = sample.finite && advflow_is_finite(sample.advantage) && advflow_is_finite(sample.extreme);
  ADVFLOW_UNROLL
  for (int k = 0; k < ADVFLOW_SUMMARY_MEANS; ++k) {
    if (k < report.mean_count) finite &= advflow_is_finite(sample.means[k]);
  }
  ADVFLOW_UNROLL
  for (int k = 0; k < ADVFLOW_RESIDUAL_STATS; ++k) finite &= advflow_is_finite(sample.stats[k]);
  ADVFLOW_UNROLL
  for (int k = 0; k < 3; ++k) finite &= advflow_is_finite(sample.coef[k]);
  if (report.ratio) finite &= advflow_is_finite(sample.log_ratio);
  return finite && advflow_gradient_fits(report, sample);
}

// Writes the sample's coefficients and, where asked for, its loss; and what it
// adds to every place.
template <typename T>
ADVFLOW_HD void advflow_summarise_sample(const AdvflowReport& report, const AdvflowSample<T>& sample, int64_t row,
                                         T* loss, T* coef, double* added) {
  const bool finite = advflow_sample_is_finite(report, sample);
  const bool usable = finite && sample.valid;
  if (report.per_sample) loss[row] = usable ? sample.means[0] : T(0);
  ADVFLOW_UNROLL
  for (int k = 0; k < 3; ++k) coef[row * 3 + k] = usable ? sample.coef[k] / T(report.divisor) : T(0);

  for (int place = 0; place < ADVFLOW_SUMMARY_PLACES; ++place) {
    added[place] = advflow_summary_none(place, report.largest);
  }
  added[ADVFLOW_SUM_NONFINITE] = finite ? 0.0 : 1.0;
  added[ADVFLOW_SUM_INVALID] = sample.valid ? 0.0 : 1.0;
  if (!usable) return;

  added[ADVFLOW_SUM_USABLE] = 1.0;
  added[ADVFLOW_SUM_FLAGGED] = sample.flagged ? 1.0 : 0.0;
  ADVFLOW_UNROLL
  for (int k = 0; k < ADVFLOW_SUMMARY_MEANS; ++k) {
    if (k < report.mean_count) added[ADVFLOW_SUM_MEANS + k] = double(sample.means[k]);
  }
  ADVFLOW_UNROLL
  for (int k = 0; k < ADVFLOW_SUMMARY_STATS; ++k) {
    if (k < report.stat_count) added[ADVFLOW_SUM_STATS + k] = double(sample.stats[k]);
  }
  const double advantage = double(sample.advantage), extreme = double(sample.extreme);
  added[ADVFLOW_SUM_ADVANTAGE] = advantage;
  added[ADVFLOW_SUM_ABS_ADVANTAGE] = advantage < 0 ? -advantage : advantage;
  added[ADVFLOW_MOST_EXTREME] = report.largest && extreme > 0 ? extreme : -extreme;
  if (report.contrast && sample.stats[ADVFLOW_STAT_VO_SQ] > T(0)) added[ADVFLOW_SUM_CONTRAST] = 1.0;
  if (!report.ratio) return;

  // In double: of a ratio this near to 1 float32 has no digits left of r - 1 squared.
  const double x = sample.log_ratio < T(80) ? double(sample.log_ratio) : 80.0, excess = expm1(x);
  added[ADVFLOW_SUM_APPROX_KL] = x * x / 2;
  added[ADVFLOW_SUM_EXCESS] = excess;
  added[ADVFLOW_SUM_EXCESS_SQ] = excess * excess;
  added[ADVFLOW_SUM_ABOVE] = sample.above ? 1.0 : 0.0;
  added[ADVFLOW_SUM_BELOW] = sample.below ? 1.0 : 0.0;
  added[ADVFLOW_MOST_LOW] = -x;
  added[ADVFLOW_MOST_HIGH] = x;
}

// The spread and the ends of a ratio, which are no means of the batch.
ADVFLOW_HD double advflow_ratio_metric(int metric, const double* totals, double usable) {
  if (metric == ADVFLOW_RATIO_STD) {
    const double excess = totals[ADVFLOW_SUM_EXCESS] / usable;
    const double variance = totals[ADVFLOW_SUM_EXCESS_SQ] / usable - excess * excess;
    return variance > 0.0 ? sqrt(variance) : 0.0;
  }
  if (!(totals[ADVFLOW_SUM_USABLE] > 0.0)) return 1.0;
  return exp(metric == ADVFLOW_RATIO_MIN ? -totals[ADVFLOW_MOST_LOW] : totals[ADVFLOW_MOST_HIGH]);
}

// Metric `metric` of advflow_summary_metrics(report), from the places of the batch.
ADVFLOW_HD double advflow_summary_metric(const AdvflowReport& report, int metric, const double* totals) {
  const double usable = totals[ADVFLOW_SUM_USABLE] > 1.0 ? totals[ADVFLOW_SUM_USABLE] : 1.0;
  const int others = report.mean_count + report.stat_count;
  int mean;  // the place of what is reported as a mean
  if (metric < report.mean_count) {
    mean = ADVFLOW_SUM_MEANS + metric;
  } else if (metric < others) {
    mean = ADVFLOW_SUM_STATS + metric - report.mean_count;
  } else if (metric < others + ADVFLOW_METRIC_EXTREME) {
    mean = ADVFLOW_SUM_ADVANTAGE + metric - others;
  } else if (metric == others + ADVFLOW_METRIC_EXTREME) {
    return report.largest ? totals[ADVFLOW_MOST_EXTREME] : -totals[ADVFLOW_MOST_EXTREME];
  } else if (metric < others + ADVFLOW_METRICS_OF_ALL) {
    return totals[ADVFLOW_SUM_FLAGGED + metric - others - ADVFLOW_METRIC_FLAGGED];
  } else if (report.contrast && metric == others + ADVFLOW_METRICS_OF_ALL) {
    mean = ADVFLOW_SUM_CONTRAST;
  } else {
    const int of_ratio = metric - others - ADVFLOW_METRICS_OF_ALL - (report.contrast ? 1 : 0);
    if (of_ratio >= ADVFLOW_RATIO_STD && of_ratio <= ADVFLOW_RATIO_MAX) {
      return advflow_ratio_metric(of_ratio, totals, usable);
    }
    mean = of_ratio < ADVFLOW_RATIO_STD ? int(ADVFLOW_SUM_APPROX_KL) + of_ratio
                                        : int(ADVFLOW_SUM_ABOVE) + of_ratio - ADVFLOW_RATIO_ABOVE;
    if (of_ratio == ADVFLOW_RATIO_MEAN) return 1.0 + totals[mean] / usable;
  }
  return totals[mean] / usable;
}

ADVFLOW_HD int advflow_summary_metrics(const AdvflowReport& report) {
  return report.mean_count + report.stat_count + ADVFLOW_METRICS_OF_ALL + (report.contrast ? 1 : 0) +
         (report.ratio ? int(ADVFLOW_METRICS_OF_RATIO) : 0);
}

// ---------------------------------------------------------------------------
// loss_summary: the samples as columns

template <typename T>
ADVFLOW_HD T advflow_column_at(const AdvflowColumn& column, int64_t row) {
  return static_cast<const T*>(column.data)[row * column.stride];
}

template <typename T>
ADVFLOW_HD AdvflowSample<T> advflow_sample_of_columns(const AdvflowLossSummaryInputs& in, int64_t row) {
  AdvflowSample<T> sample = {};
  sample.stats = static_cast<const T*>(in.stats) + row * ADVFLOW_RESIDUAL_STATS;
  ADVFLOW_UNROLL
  for (int k = 0; k < 3; ++k) sample.coef[k] = static_cast<const T*>(in.coef)[row * 3 + k];
  ADVFLOW_UNROLL
  for (int k = 0; k < ADVFLOW_SUMMARY_MEANS; ++k) {
    if (k < in.report.mean_count) sample.means[k] = advflow_column_at<T>(in.means[k], row);
  }
  sample.advantage = advflow_column_at<T>(in.advantages, row);
  sample.extreme = advflow_column_at<T>(in.extreme, row);
  sample.valid = in.valid[row] != 0;
  sample.flagged = in.flagged[row] != 0;
  sample.finite = true;
  ADVFLOW_UNROLL
  for (int k = 0; k < ADVFLOW_SUMMARY_REQUIRED; ++k) {
    if (k < in.required_count) sample.finite &= advflow_is_finite(advflow_column_at<T>(in.required[k], row));
  }
  if (!in.report.ratio) return sample;
  sample.log_ratio = advflow_column_at<T>(in.log_ratio, row);
  sample.above = in.log_highest.data && sample.log_ratio > advflow_column_at<T>(in.log_highest, row);
  sample.below = in.log_lowest.data && sample.log_ratio < advflow_column_at<T>(in.log_lowest, row);
  return sample;
}
