// What lies between the statistics of a loss and its gradient, on CUDA: one block for the whole batch
// finishes the statistics, applies the loss's formula to every sample and joins them. It begins while the kernel that
// sums the statistics is at work, and lets the gradient's begin.
#include "common/launch.cuh"
#include "common/rows.cuh"
#include "cuda/summary.cuh"
#include "math/losses.h"

namespace {

// More than the samples are joined by: what is long here is a row of partial sums, and there are many.
constexpr int kThreads = 4 * kAdvflowSummaryThreads;

__device__ void prefetch_number(const AdvflowNumber& number, int64_t row) {
  if (!number.data) return;
  advflow_prefetch(static_cast<const char*>(number.data) + row * number.stride * (number.wide ? 8 : 4));
}

// What is given for a sample, read here for the first time or the second.
template <typename Loss>
__device__ void prefetch_sample(const AdvflowLossInputs& in, int64_t row) {
  prefetch_number(in.advantages, row);
  if (Loss::transitions) {
    advflow_prefetch(in.index + row);
  } else {
    prefetch_number(in.t, row);
  }
#pragma unroll
  for (int k = 0; k < Loss::numbers; ++k) prefetch_number(in.numbers[k], row);
}

template <typename Loss>
__global__ void __launch_bounds__(kThreads) loss_kernel(AdvflowLossInputs in, const float* partials, int splits,
                                                        float* stats, float* loss, float* coef, float* metrics) {
  advflow_let_next_begin();
  if (threadIdx.x < in.report.batch) prefetch_sample<Loss>(in, threadIdx.x);
  advflow_await_previous();
  for (int64_t i = threadIdx.x; i < in.report.batch * ADVFLOW_RESIDUAL_STATS; i += kThreads) {
    stats[i] = advflow_row_mean<ADVFLOW_RESIDUAL_STATS>(partials, i / ADVFLOW_RESIDUAL_STATS,
                                                        int(i % ADVFLOW_RESIDUAL_STATS), splits, in.elements);
  }
  __syncthreads();
  const AdvflowLossRows<float> rows = {in, stats};
  advflow_summarise(
      advflow_report_of<Loss>(in.report), [&](int64_t row) { return advflow_sample_of_loss<Loss>(rows, row); }, loss,
      coef, metrics);
}

}  // namespace

int advflow_loss_cuda(const AdvflowLossInputs* in, const void* partials, void* stats, void* loss, void* masked_coef,
                      void* metrics, void* where) {
  if (in->dtype != ADVFLOW_FLOAT32) return ADVFLOW_UNSUPPORTED_DTYPE;
  const int splits = int(advflow_plan_row(in->elements).splits);
  advflow_with_loss(in->loss, [&](auto loss_is) {
    using Loss = decltype(loss_is);
    ADVFLOW_LAUNCH_EARLY(loss_kernel<Loss>, dim3(1), dim3(kThreads), static_cast<cudaStream_t>(where), *in,
                         static_cast<const float*>(partials), splits, static_cast<float*>(stats),
                         static_cast<float*>(loss), static_cast<float*>(masked_coef), static_cast<float*>(metrics));
  });
  return advflow_last_error();
}
