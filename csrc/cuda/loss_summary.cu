// The scalar stage of a loss on CUDA: one block for the whole batch, since it is
// a few numbers a sample and what it saves is launches.
#include "common/status.h"
#include "cuda/summary.cuh"

namespace {

__global__ void __launch_bounds__(kAdvflowSummaryThreads)
    loss_summary_kernel(AdvflowLossSummaryInputs in, float* loss, float* coef, float* metrics) {
  advflow_summarise(
      in.report, [&](int64_t row) { return advflow_sample_of_columns<float>(in, row); }, loss, coef, metrics);
}

}  // namespace

int advflow_loss_summary_cuda(const AdvflowLossSummaryInputs* in, void* loss, void* masked_coef, void* metrics,
                              void* where) {
  if (in->dtype != ADVFLOW_FLOAT32) return ADVFLOW_UNSUPPORTED_DTYPE;
  ADVFLOW_LAUNCH(loss_summary_kernel, dim3(1), dim3(kAdvflowSummaryThreads), static_cast<cudaStream_t>(where), *in,
                 static_cast<float*>(loss), static_cast<float*>(masked_coef), static_cast<float*>(metrics));
  return -int(cudaGetLastError());
}
