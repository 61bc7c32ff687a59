// Launches that overlap the end of the kernel before (programmatic dependent launch, from Hopper on).
//
// A kernel launched by ADVFLOW_LAUNCH_EARLY may begin as soon as every block of the one before it in the stream has
// called advflow_let_next_begin or ended. It calls advflow_await_previous before it reads or writes memory: that
// returns when the one before has ended, and with it whatever that one waited for. It may ask for what it will read
// (advflow_prefetch) before that, and never reads by __ldg, which takes memory for constant as long as a kernel lives.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

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

// Into the cache that all multiprocessors share, where what is written later changes it.
__device__ inline void advflow_prefetch(const void* address) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#else
  (void)address;
#endif
}

#if defined(__CUDACC__)
// Whether the code that runs waits: what was compiled for an older architecture has no such instruction, also where the
// driver makes code for a newer device of it. Asked once for each kernel and device.
template <auto kKernel>
bool advflow_can_launch_early() {
  constexpr int kDevices = 64;
  static std::atomic<signed char> known[kDevices] = {};
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  signed char answer = known[device].load(std::memory_order_relaxed);
  if (!answer) {
    cudaFuncAttributes of = {};
    answer = cudaFuncGetAttributes(&of, kKernel) == cudaSuccess && of.ptxVersion >= 90 ? 1 : -1;
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer > 0;
}

template <auto kKernel, typename... Parameters, typename... Arguments>
void advflow_launch_early(void (*)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = advflow_can_launch_early<kKernel>() ? 1 : 0;
  // What it returns is also what cudaGetLastError does.
  cudaLaunchKernelEx(&config, kKernel, Parameters(arguments)...);
}

// `kernel` is a constant expression.
#define ADVFLOW_LAUNCH_EARLY(kernel, grid, block, stream, ...) \
  advflow_launch_early<kernel>(kernel, grid, block, stream, __VA_ARGS__)
#endif
