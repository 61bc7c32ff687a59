// The scalar stage of a loss on the CPU: a few numbers a sample, one thread.
#include "cpu/summary.h"

namespace {

template <typename T>
int run(const AdvflowLossSummaryInputs& in, void* loss, void* coef, void* metrics) {
  return advflow_summarise(
      in.report, [&](int64_t row) { return advflow_sample_of_columns<T>(in, row); }, static_cast<T*>(loss),
      static_cast<T*>(coef), static_cast<T*>(metrics));
}

}  // namespace

int advflow_loss_summary_cpu(const AdvflowLossSummaryInputs* in, void* loss, void* masked_coef, void* metrics, void*) {
  if (in->dtype == ADVFLOW_FLOAT64) return run<double>(*in, loss, masked_coef, metrics);
  return run<float>(*in, loss, masked_coef, metrics);
}
