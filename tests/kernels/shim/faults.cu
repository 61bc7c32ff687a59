// Kernels with one mistake each: what the launch shim must report.
#include <cuda_runtime.h>

namespace {

__global__ void divergent_barrier_kernel() {
  if (threadIdx.x == 0) return;
  __syncthreads();
}

__global__ void misaligned_read_kernel(const char* data, unsigned* out) {
  const uint4 word = __ldg(reinterpret_cast<const uint4*>(data + 4));
  out[threadIdx.x] = word.x;
}

__global__ void misaligned_write_kernel(char* data) { *reinterpret_cast<uint4*>(data + 8) = make_uint4(1, 2, 3, 4); }

__global__ void lane_numbers_kernel(unsigned* out) {
  unsigned sum = threadIdx.x;
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, offset);
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

}  // namespace

extern "C" {

int divergent_barrier() {
  ADVFLOW_LAUNCH(divergent_barrier_kernel, dim3(1), dim3(32), nullptr);
  return cudaGetLastError();
}

int misaligned_read(const char* data, unsigned* out) {
  ADVFLOW_LAUNCH(misaligned_read_kernel, dim3(1), dim3(1), nullptr, data, out);
  return cudaGetLastError();
}

int misaligned_write(char* data) {
  ADVFLOW_LAUNCH(misaligned_write_kernel, dim3(1), dim3(1), nullptr, data);
  return cudaGetLastError();
}

int empty_grid() {
  ADVFLOW_LAUNCH(divergent_barrier_kernel, dim3(0), dim3(32), nullptr);
  return cudaGetLastError();
}

int lane_numbers(unsigned* out) {
  ADVFLOW_LAUNCH(lane_numbers_kernel, dim3(2), dim3(64), nullptr, out);
  return cudaGetLastError();
}

}  // extern "C"
