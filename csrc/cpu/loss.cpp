// What lies between the statistics of a loss and its gradient, on the CPU: one thread.
#include "common/rows.h"
#include "cpu/summary.h"
#include "math/losses.h"

namespace {

template <typename T>
int run(const AdvflowLossInputs& in, const double* partials, T* stats, void* loss, void* coef, void* metrics) {
  advflow_finish_means<ADVFLOW_RESIDUAL_STATS>(partials, in.report.batch, in.elements, stats);
  const AdvflowLossRows<T> rows = {in, stats};
  return advflow_with_loss(in.loss, [&](auto loss_is) {
    using Loss = decltype(loss_is);
    return advflow_summarise(
        advflow_report_of<Loss>(in.report), [&](int64_t row) { return advflow_sample_of_loss<Loss>(rows, row); },
        static_cast<T*>(loss), static_cast<T*>(coef), static_cast<T*>(metrics));
  });
}

}  // namespace

int advflow_loss_cpu(const AdvflowLossInputs* in, const void* partials, void* stats, void* loss, void* masked_coef,
                     void* metrics, void*) {
  const double* sums = static_cast<const double*>(partials);
  if (in->dtype == ADVFLOW_FLOAT64) return run(*in, sums, static_cast<double*>(stats), loss, masked_coef, metrics);
  return run(*in, sums, static_cast<float*>(stats), loss, masked_coef, metrics);
}
