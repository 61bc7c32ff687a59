// The samples of a batch joined by one block, into loss, coefficients and metrics.
//
// A tail that works on a few numbers a sample is as long as its chain of
// dependent instructions, and as its code, which is fetched to run once. So
// what a sample adds goes to shared memory, and a lane joins one place of 32
// samples in their order: the loop is short, and nothing is shuffled.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "common/macros.h"
#include "common/reduce.cuh"
#include "math/loss_summary.h"

constexpr int kAdvflowSummaryThreads = 128;
constexpr int kAdvflowSummaryWarps = kAdvflowSummaryThreads / kAdvflowWarp;
// Odd, so that the threads of a warp write to different banks.
constexpr int kAdvflowSummaryStride = ADVFLOW_SUMMARY_PLACES | 1;

// Called by every thread of one block, of which the first kAdvflowSummaryThreads work, once a kernel; sample_of(row) is
// an AdvflowSample.
template <typename SampleOf>
__device__ void advflow_summarise(const AdvflowReport& report, SampleOf sample_of, float* loss, float* coef,
                                  float* metrics) {
  static_assert(ADVFLOW_SUMMARY_PLACES <= kAdvflowWarp, "one lane joins each place");
  __shared__ double added[kAdvflowSummaryThreads][kAdvflowSummaryStride];
  __shared__ double of_warps[kAdvflowSummaryWarps][ADVFLOW_SUMMARY_PLACES];
  __shared__ double totals[ADVFLOW_SUMMARY_PLACES];
  const int thread = int(threadIdx.x), lane = thread % kAdvflowWarp, first_of_warp = thread - lane;
  const bool works = thread < kAdvflowSummaryThreads, joins = works && lane < ADVFLOW_SUMMARY_PLACES;

  double total = advflow_summary_none(lane, report.largest);
  for (int64_t first = 0; first < report.batch; first += kAdvflowSummaryThreads) {
    const int64_t row = first + thread;
    if (works && row < report.batch) advflow_summarise_sample(report, sample_of(row), row, loss, coef, added[thread]);
    __syncthreads();
    const int64_t left = report.batch - first - first_of_warp;
    const int count = left < kAdvflowWarp ? int(left) : kAdvflowWarp;
    if (joins) {
#pragma unroll 8
      for (int k = 0; k < count; ++k) total = advflow_summary_join(lane, total, added[first_of_warp + k][lane]);
    }
    __syncthreads();
  }

  if (joins) of_warps[thread / kAdvflowWarp][lane] = total;
  __syncthreads();
  if (thread < ADVFLOW_SUMMARY_PLACES) {
    total = of_warps[0][thread];
    for (int warp = 1; warp < kAdvflowSummaryWarps; ++warp) {
      total = advflow_summary_join(thread, total, of_warps[warp][thread]);
    }
    totals[thread] = total;
  }
  __syncthreads();
  if (thread == 0 && !report.per_sample) *loss = float(totals[ADVFLOW_SUM_MEANS] / report.divisor);
  if (thread < advflow_summary_metrics(report)) metrics[thread] = float(advflow_summary_metric(report, thread, totals));
}
