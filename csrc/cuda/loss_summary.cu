// The scalar stage of a loss on CUDA: one block for the whole batch, since it is
// a few numbers a sample and what it saves is launches.
#include <cuda_runtime.h>

#include "common/macros.h"
#include "common/reduce.cuh"
#include "common/status.h"
#include "math/loss_summary.h"

namespace {

constexpr int kMaxThreads = 256;

__device__ AdvflowSummaryExtremes block_extremes(AdvflowSummaryExtremes found, bool largest) {
  __shared__ AdvflowSummaryExtremes of_warps[kAdvflowMaxWarps];
#pragma unroll
  for (int offset = kAdvflowWarp / 2; offset > 0; offset /= 2) {
    const AdvflowSummaryExtremes other = {__shfl_xor_sync(0xFFFFFFFFu, found.extreme, offset),
                                          __shfl_xor_sync(0xFFFFFFFFu, found.lowest, offset),
                                          __shfl_xor_sync(0xFFFFFFFFu, found.highest, offset)};
    found = advflow_join_extremes(found, other, largest);
  }
  if (threadIdx.x % kAdvflowWarp == 0) of_warps[threadIdx.x / kAdvflowWarp] = found;
  __syncthreads();
  for (int warp = 0; warp < int(blockDim.x) / kAdvflowWarp; ++warp) {
    found = advflow_join_extremes(found, of_warps[warp], largest);
  }
  return found;
}

__global__ void __launch_bounds__(kMaxThreads)
    loss_summary_kernel(AdvflowLossSummaryInputs in, float* loss, float* coef, float* metrics) {
  double sums[ADVFLOW_SUMMARY_SUMS] = {};
  AdvflowSummaryExtremes extremes = advflow_no_extremes(in.largest);
  for (int64_t row = threadIdx.x; row < in.batch; row += blockDim.x) {
    advflow_summarise_sample(in, row, loss, coef, sums, &extremes);
  }
  extremes = block_extremes(extremes, in.largest);

  __shared__ double totals[ADVFLOW_SUMMARY_SUMS];
  const double total = advflow_block_sum(sums);
  if (threadIdx.x < ADVFLOW_SUMMARY_SUMS) totals[threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.x == 0 && !in.per_sample) *loss = float(totals[ADVFLOW_SUM_MEANS] / in.divisor);
  if (int(threadIdx.x) < advflow_summary_metrics(in)) {
    metrics[threadIdx.x] = float(advflow_summary_metric(in, int(threadIdx.x), totals, extremes));
  }
}

}  // namespace

int advflow_loss_summary_cuda(const AdvflowLossSummaryInputs* in, void* loss, void* masked_coef, void* metrics,
                              void* where) {
  static_assert(ADVFLOW_SUMMARY_SUMS <= kAdvflowWarp, "one warp writes every metric");
  if (in->dtype != ADVFLOW_FLOAT32) return ADVFLOW_UNSUPPORTED_DTYPE;
  const int threads = in->batch <= kAdvflowWarp ? kAdvflowWarp : kMaxThreads;
  ADVFLOW_LAUNCH(loss_summary_kernel, dim3(1), dim3(threads), static_cast<cudaStream_t>(where), *in,
                 static_cast<float*>(loss), static_cast<float*>(masked_coef), static_cast<float*>(metrics));
  return -int(cudaGetLastError());
}
