// Stands in for the CUDA toolkit when a host compiler builds a .cu file, so
// that a kernel's indexing, tails and reduction trees run where no GPU is.
//
// Each thread of a block is a fiber; blocks run one after another. A barrier
// or a shuffle yields to the other fibers until all have arrived. One that can
// never be reached by all, a misaligned 16-byte access and an illegal launch
// configuration come back as CUDA errors.
//
// Not modelled: races between warps, memory ordering, occupancy, speed.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// Blocks run in turn, so one copy serves them all.
#define __shared__ static
#define ADVFLOW_LAUNCH(kernel, grid, block, stream, ...) \
  advflow_shim::launch(grid, block, stream, [&] { kernel(__VA_ARGS__); })
#define ADVFLOW_LAUNCH_EARLY ADVFLOW_LAUNCH

using std::min;

typedef struct AdvflowShimStream* cudaStream_t;

enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
};

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct uint3 {
  unsigned x, y, z;
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace advflow_shim {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;

inline cudaError_t last_error = cudaSuccess;

inline void fail(cudaError_t error, const char* why) {
  if (last_error == cudaSuccess) fprintf(stderr, "launch shim: %s\n", why);
  last_error = error;
}

inline void check_aligned16(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) fail(cudaErrorMisalignedAddress, "misaligned 16-byte access");
}

struct Barrier {
  unsigned arrived = 0;
  unsigned generation = 0;
};

struct Fiber {
  jmp_buf context;
  char* stack = nullptr;
  bool alive = false;
};

// What lanes exchange. Two sets of slots: a lane may start the next exchange while a slower one
// still reads this one, but it cannot finish it.
struct Exchange {
  Barrier barrier;
  uint64_t slots[2][kWarp];
};

struct Warp {
  Exchange whole;
  Exchange pairs[kWarp / 2];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  jmp_buf scheduler;
  const std::function<void()>* body = nullptr;
  unsigned current = 0;
  bool progress = false;
};

inline Block block;

inline void yield() {
  if (_setjmp(block.fibers[block.current].context) == 0) _longjmp(block.scheduler, 1);
  threadIdx = {block.current, 0, 0};
}

inline void wait(Barrier& barrier, unsigned expected) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    block.progress = true;
    return;
  }
  while (barrier.generation == generation) yield();
}

inline void fiber_main() {
  (*block.body)();
  block.fibers[block.current].alive = false;
  block.progress = true;
  _longjmp(block.scheduler, 1);
}

// A context is made once a fiber; every later switch is a plain longjmp,
// because swapcontext enters the kernel for the signal mask each time.
inline void start(Fiber& fiber) {
  if (fiber.stack == nullptr) fiber.stack = static_cast<char*>(malloc(kStackBytes));
  fiber.alive = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  if (_setjmp(block.scheduler) == 0) setcontext(&context);
}

inline bool run_block(unsigned threads) {
  block.barrier = Barrier();
  block.warps.assign((threads + kWarp - 1) / kWarp, Warp());
  for (block.current = 0; block.current < threads; ++block.current) {
    threadIdx = {block.current, 0, 0};
    start(block.fibers[block.current]);
  }
  for (unsigned alive = threads; alive > 0;) {
    alive = 0;
    block.progress = false;
    for (block.current = 0; block.current < threads; ++block.current) {
      Fiber& fiber = block.fibers[block.current];
      if (!fiber.alive) continue;
      if (_setjmp(block.scheduler) == 0) _longjmp(fiber.context, 1);
      alive += block.fibers[block.current].alive;
    }
    if (alive > 0 && !block.progress) return false;
  }
  return true;
}

inline void launch(dim3 grid, dim3 threads, cudaStream_t, const std::function<void()>& body) {
  const bool legal = grid.x > 0 && grid.x <= INT32_MAX && grid.y == 1 && grid.z == 1 && threads.x > 0 &&
                     threads.x <= 1024 && threads.y == 1 && threads.z == 1;
  if (!legal) return fail(cudaErrorInvalidConfiguration, "illegal or unsupported grid or block");
  if (block.fibers.size() < threads.x) block.fibers.resize(threads.x);
  block.body = &body;
  gridDim = grid;
  blockDim = threads;
  for (unsigned i = 0; i < grid.x; ++i) {
    blockIdx = {i, 0, 0};
    if (!run_block(threads.x)) return fail(cudaErrorLaunchFailure, "a barrier that not every thread reaches");
  }
}

}  // namespace advflow_shim

// No alignas: the compiler would take alignment for granted, and this is where
// it is checked.
struct uint4 {
  uint32_t x, y, z, w;
  uint4() = default;
  uint4(uint32_t x_, uint32_t y_, uint32_t z_, uint32_t w_) : x(x_), y(y_), z(z_), w(w_) {}
  uint4(const uint4&) = default;
  uint4& operator=(const uint4& other) {
    advflow_shim::check_aligned16(this);
    x = other.x, y = other.y, z = other.z, w = other.w;
    return *this;
  }
};

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return uint4(x, y, z, w); }

template <typename T>
T __ldg(const T* address) {
  if (sizeof(T) == 16) advflow_shim::check_aligned16(address);
  return *address;
}

template <typename T>
T __ldcs(const T* address) {
  return __ldg(address);
}

template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}

inline void __syncthreads() { advflow_shim::wait(advflow_shim::block.barrier, blockDim.x); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  using namespace advflow_shim;
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most 8 bytes");
  Warp& warp = block.warps[threadIdx.x / kWarp];
  const unsigned lane = threadIdx.x % kWarp, pair = lane / 2;
  const bool whole = mask == 0xFFFFFFFFu;
  if (!whole && (mask != 3u << (2 * pair) || lane_mask != 1)) {
    fail(cudaErrorLaunchFailure, "only shuffles of whole warps and of pairs are modelled");
  }
  Exchange& exchange = whole ? warp.whole : warp.pairs[pair];
  uint64_t* slots = exchange.slots[exchange.barrier.generation % 2];
  memcpy(&slots[lane], &value, sizeof(T));
  wait(exchange.barrier, whole ? kWarp : 2);
  memcpy(&value, &slots[lane ^ unsigned(lane_mask)], sizeof(T));
  return value;
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = advflow_shim::last_error;
  advflow_shim::last_error = cudaSuccess;
  return error;
}
