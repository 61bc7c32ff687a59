// The scalar stage of a loss on the CPU: a few numbers a sample, one thread.
#include "math/loss_summary.h"

#include "common/status.h"

namespace {

template <typename T>
int run(const AdvflowLossSummaryInputs& in, T* loss, T* coef, T* metrics) {
  double sums[ADVFLOW_SUMMARY_SUMS] = {};
  AdvflowSummaryExtremes extremes = advflow_no_extremes(in.largest);
  for (int64_t row = 0; row < in.batch; ++row) advflow_summarise_sample(in, row, loss, coef, sums, &extremes);
  if (!in.per_sample) *loss = T(sums[ADVFLOW_SUM_MEANS] / in.divisor);
  for (int place = 0; place < advflow_summary_metrics(in); ++place) {
    metrics[place] = T(advflow_summary_metric(in, place, sums, extremes));
  }
  return ADVFLOW_OK;
}

}  // namespace

int advflow_loss_summary_cpu(const AdvflowLossSummaryInputs* in, void* loss, void* masked_coef, void* metrics, void*) {
  if (in->dtype == ADVFLOW_FLOAT64) {
    return run(*in, static_cast<double*>(loss), static_cast<double*>(masked_coef), static_cast<double*>(metrics));
  }
  return run(*in, static_cast<float*>(loss), static_cast<float*>(masked_coef), static_cast<float*>(metrics));
}
