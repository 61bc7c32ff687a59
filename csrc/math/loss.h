// What the formula of a loss reads of its batch, and what it says of a sample.
//
// A loss is a struct in a header of its name, on AdvflowOfSamples or AdvflowOfTransitions, with
//   static constexpr int numbers;        how many of AdvflowLossInputs::numbers it reads
//   static constexpr int choices[...];   how many values each of its choices has, 0 for none
//   template <typename T> static void sample(const AdvflowLossRows<T>&, int64_t row, AdvflowSample<T>*);
// where `sample` finds the statistics, the advantage and whether it is valid filled in, and fills in the rest.
#pragma once

#include "math/loss_summary.h"

template <typename T>
ADVFLOW_HD double advflow_number_at(const AdvflowNumber& number, int64_t row) {
  if (!number.data) return number.number;
  const int64_t place = row * number.stride;
  return number.wide ? static_cast<const double*>(number.data)[place]
                     : double(static_cast<const T*>(number.data)[place]);
}

// One row of a sampler's table; ones where it is no step that can be trained.
template <typename T>
struct AdvflowStep {
  T c_v, sigma, kappa, dt;
  bool valid;
};

template <typename T>
struct AdvflowLossRows {
  const AdvflowLossInputs& in;
  const T* stats;  // [batch, ADVFLOW_RESIDUAL_STATS]

  ADVFLOW_HD T t(int64_t row) const { return T(advflow_number_at<T>(in.t, row)); }
  ADVFLOW_HD T advantage(int64_t row) const { return T(advflow_number_at<T>(in.advantages, row)); }
  ADVFLOW_HD double exact_number(int k, int64_t row) const { return advflow_number_at<T>(in.numbers[k], row); }
  ADVFLOW_HD T number(int k, int64_t row) const { return T(exact_number(k, row)); }
  ADVFLOW_HD AdvflowStep<T> step(int64_t row) const {
    const int64_t index = in.index[row], last = in.step_rows - 1;
    const int64_t place = index < 0 ? 0 : index < last ? index + 1 : last;
    const T* columns = static_cast<const T*>(in.steps) + place * ADVFLOW_STEP_COLUMNS;
    if (!(columns[2] > T(0))) return {T(1), T(1), T(1), T(1), false};  // or NaN
    return {columns[1], columns[2], columns[3], columns[4], true};
  }
};

// A loss of the forward process.
struct AdvflowOfSamples {
  static constexpr bool transitions = false;
  static constexpr int means = 2;                  // loss, policy term
  static constexpr int mix = -1, mixed_when = -1;  // the number that is the mix of residual_stats, and its choice
};

// A loss of the reverse process.
struct AdvflowOfTransitions {
  static constexpr bool transitions = true;
  static constexpr int means =
      6;  // loss, policy term, the same before its weights, log-ratio, KL to rollout, reference
  static constexpr int mix = -1, mixed_when = -1;
};

template <typename Loss, typename T>
ADVFLOW_HD AdvflowSample<T> advflow_sample_of_loss(const AdvflowLossRows<T>& rows, int64_t row) {
  AdvflowSample<T> sample = {};
  sample.stats = rows.stats + row * ADVFLOW_RESIDUAL_STATS;
  sample.advantage = rows.advantage(row);
  if (Loss::transitions) {
    sample.valid = rows.step(row).valid;
    sample.finite = true;
  } else {
    const T t = rows.t(row);
    sample.valid = t > T(0) && t <= T(1);
    sample.finite = advflow_is_finite(t);
  }
  ADVFLOW_UNROLL
  for (int k = 0; k < Loss::numbers; ++k) sample.finite &= advflow_is_finite(rows.number(k, row));
  Loss::sample(rows, row, &sample);
  return sample;
}

// What of a report is the loss's own: constants, so that a kernel has no code for what its loss does not report.
template <typename Loss>
ADVFLOW_HD AdvflowReport advflow_report_of(AdvflowReport report) {
  report.mean_count = Loss::means;
  report.stat_count = Loss::transitions ? 0 : int(ADVFLOW_SUMMARY_STATS);
  report.largest = report.eps_first = report.ratio = Loss::transitions;
  report.contrast = true;
  return report;
}

// ---------------------------------------------------------------------------
// What losses of the forward process share

enum AdvflowWeighting : int {
  ADVFLOW_WEIGHTING_PREDICTION = 0,
  ADVFLOW_WEIGHTING_VELOCITY = 1,
  ADVFLOW_WEIGHTING_ADAPTIVE = 2,
  ADVFLOW_WEIGHTINGS = 3,
};

// The scale of a distance in prediction space, where residuals are -t times those of velocities.
template <typename T>
ADVFLOW_HD T advflow_scale_of(T t, T distance) {
  const T scale = t * distance;
  return scale < T(1e-5) ? T(1e-5) : scale;  // NaN stays
}

// m of the docs: t^2, 1, or t^2 over the mean error of the prediction.
template <typename T>
ADVFLOW_HD T advflow_sample_weight(int weighting, T t, const T* stats) {
  if (weighting == ADVFLOW_WEIGHTING_VELOCITY) return T(1);
  const T square = t * t;
  return weighting == ADVFLOW_WEIGHTING_ADAPTIVE ? square / advflow_scale_of(t, stats[ADVFLOW_STAT_VU_ABS]) : square;
}
