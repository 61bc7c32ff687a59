// Launches that overlap the end of the kernel before (programmatic dependent launch, from Hopper on).
//
// A kernel launched by ADVFLOW_LAUNCH_EARLY may begin as soon as every block of the one before it in the stream has
// called advflow_let_next_begin or ended. It calls advflow_await_previous before it touches memory: that returns when
// the one before has ended, and with it whatever that one waited for.
#pragma once

#include <cuda_runtime.h>

#include "common/macros.h"

__device__ inline void advflow_let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline void advflow_await_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Into the cache that all multiprocessors share, where what is written later changes it: allowed before
// advflow_await_previous.
__device__ inline void advflow_prefetch(const void* address) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#else
  (void)address;
#endif
}

#if defined(__CUDACC__)
inline bool advflow_can_launch_early() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
}

template <typename... Parameters, typename... Arguments>
void advflow_launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
                          Arguments... arguments) {
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = advflow_can_launch_early() ? 1 : 0;
  // What it returns is also what cudaGetLastError does.
  cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

#define ADVFLOW_LAUNCH_EARLY(kernel, grid, block, stream, ...) \
  advflow_launch_early(kernel, grid, block, stream, __VA_ARGS__)
#endif
