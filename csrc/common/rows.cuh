// How the CUDA kernels walk a batch of rows.
//
// A row is cut into `splits` pieces by its length alone, a piece is summed by one
// block in a fixed order, and one thread adds the pieces in order. No atomics, so
// nothing depends on scheduling or on the other rows.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <algorithm>
#include <type_traits>

#include "common/dtype.h"
#include "common/launch.cuh"
#include "common/macros.h"
#include "common/reduce.cuh"
#include "common/status.h"
#include "common/vec.h"

constexpr int kAdvflowMaxThreads = 256;
constexpr int kAdvflowMinThreads = kAdvflowWarp;
constexpr int kAdvflowFinishThreads = 128;
// Two tiles a block amortise its reduction; a 512 px latent (65,536 elements)
// then gives 16 blocks a row.
constexpr int kAdvflowTilesPerSplit = 2;
// One row alone should still occupy most of a large GPU, and one thread has to
// add this many partial sums.
constexpr int64_t kAdvflowMaxSplits = 128;

// How a row is cut. A function of its length only.
struct AdvflowRowPlan {
  int threads;
  int64_t tile;   // elements a block reads in one step
  int64_t tiles;  // steps in a row
  int64_t splits;
  int64_t split_elements;
};

inline AdvflowRowPlan advflow_plan_row(int64_t elements) {
  AdvflowRowPlan plan;
  plan.threads = kAdvflowMinThreads;
  while (plan.threads < kAdvflowMaxThreads && int64_t(plan.threads) * kAdvflowVec < elements) plan.threads *= 2;
  plan.tile = int64_t(plan.threads) * kAdvflowVec;
  plan.tiles = std::max<int64_t>(1, (elements + plan.tile - 1) / plan.tile);
  const int64_t wanted = std::min(kAdvflowMaxSplits, (plan.tiles + kAdvflowTilesPerSplit - 1) / kAdvflowTilesPerSplit);
  const int64_t tiles_per_split = (plan.tiles + wanted - 1) / wanted;
  plan.splits = (plan.tiles + tiles_per_split - 1) / tiles_per_split;
  plan.split_elements = tiles_per_split * plan.tile;
  return plan;
}

__device__ inline int advflow_valid_elements(int64_t begin, int64_t end) {
  return end - begin < kAdvflowVec ? int(end - begin) : kAdvflowVec;
}

// The mean of one column of a row, from partials[batch][splits][kColumns]; 0 of a row without elements. Few numbers, so
// double costs nothing and the finish adds no error of its own.
template <int kColumns, typename T>
__device__ T advflow_row_mean(const T* partials, int64_t row, int column, int splits, int64_t elements) {
  const T* partial = partials + row * splits * kColumns + column;
  double sum = 0.0;
#pragma unroll 16
  for (int split = 0; split < splits; ++split) sum += partial[split * kColumns];
  return T(sum / double(elements ? elements : 1));
}

// means[batch][kColumns], one thread each; launched early, after the kernel that made the partials.
template <int kColumns, typename T>
__global__ void __launch_bounds__(kAdvflowFinishThreads)
    advflow_row_means_kernel(const T* partials, T* means, int64_t batch, int splits, int64_t elements) {
  advflow_await_previous();
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= batch * kColumns) return;
  means[i] = advflow_row_mean<kColumns>(partials, i / kColumns, int(i % kColumns), splits, elements);
}

inline int advflow_last_error() { return -int(cudaGetLastError()); }

template <int kColumns, typename T>
int advflow_launch_row_means(const T* partials, T* means, int64_t batch, const AdvflowRowPlan& plan, int64_t elements,
                             cudaStream_t stream) {
  const int64_t blocks = (batch * kColumns + kAdvflowFinishThreads - 1) / kAdvflowFinishThreads;
  constexpr auto kernel = advflow_row_means_kernel<kColumns, T>;
  ADVFLOW_LAUNCH_EARLY(kernel, dim3(unsigned(blocks)), dim3(kAdvflowFinishThreads), stream, partials, means, batch,
                       int(plan.splits), elements);
  return advflow_last_error();
}

// ---------------------------------------------------------------------------
// For launchers

inline bool advflow_is_supported(AdvflowDtype dtype) {
  return dtype == ADVFLOW_FLOAT32 || dtype == ADVFLOW_FLOAT16 || dtype == ADVFLOW_BFLOAT16;
}

inline bool advflow_is_supported(const AdvflowTensor& tensor) {
  return tensor.data == nullptr || advflow_is_supported(tensor.dtype);
}

inline bool advflow_fits_grid(int64_t blocks) { return blocks <= INT32_MAX; }

template <typename F>
void advflow_with_bool(bool value, F f) {
  if (value) {
    f(std::true_type{});
  } else {
    f(std::false_type{});
  }
}
