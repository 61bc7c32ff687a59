// The samples of a batch joined by one thread, in their order, into loss, coefficients and metrics.
#pragma once

#include "common/status.h"
#include "math/loss_summary.h"

// sample_of(row) is an AdvflowSample.
template <typename T, typename SampleOf>
int advflow_summarise(const AdvflowReport& report, SampleOf sample_of, T* loss, T* coef, T* metrics) {
  double totals[ADVFLOW_SUMMARY_PLACES], added[ADVFLOW_SUMMARY_PLACES];
  for (int place = 0; place < ADVFLOW_SUMMARY_PLACES; ++place) {
    totals[place] = advflow_summary_none(place, report.largest);
  }
  for (int64_t row = 0; row < report.batch; ++row) {
    advflow_summarise_sample(report, sample_of(row), row, loss, coef, added);
    for (int place = 0; place < ADVFLOW_SUMMARY_PLACES; ++place) {
      totals[place] = advflow_summary_join(place, totals[place], added[place]);
    }
  }
  if (!report.per_sample) *loss = T(totals[ADVFLOW_SUM_MEANS] / report.divisor);
  for (int metric = 0; metric < advflow_summary_metrics(report); ++metric) {
    metrics[metric] = T(advflow_summary_metric(report, metric, totals));
  }
  return ADVFLOW_OK;
}
