// Sums over a thread block in an order fixed by the block size alone.
#pragma once

constexpr int kAdvflowWarp = 32;
constexpr int kAdvflowMaxWarps = 32;

template <typename T>
__device__ T advflow_warp_sum(T value) {
#pragma unroll
  for (int offset = kAdvflowWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  return value;
}

// Sums kCount values over all threads; thread k < kCount receives total k. The
// block is whole warps, every thread calls this, once a kernel (the shared
// array is not guarded for a second use).
template <int kCount, typename T>
__device__ T advflow_block_sum(const T (&values)[kCount]) {
  static_assert(kCount <= kAdvflowWarp, "one thread finishes each total");
  __shared__ T warp_sums[kCount][kAdvflowMaxWarps];
  const int warp = threadIdx.x / kAdvflowWarp;
  const int lane = threadIdx.x % kAdvflowWarp;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const T sum = advflow_warp_sum(values[k]);
    if (lane == 0) warp_sums[k][warp] = sum;
  }
  __syncthreads();

  T total = T(0);
  if (threadIdx.x < kCount) {
    for (int w = 0; w < int(blockDim.x) / kAdvflowWarp; ++w) total += warp_sums[threadIdx.x][w];
  }
  return total;
}
