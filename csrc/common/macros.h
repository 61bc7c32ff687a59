// What differs between nvcc and a host compiler.
//
// Kernels are launched through ADVFLOW_LAUNCH because tests also compile the
// .cu files with g++ (tests/kernels/shim), which cannot parse <<<...>>>.
#pragma once

#if defined(__CUDACC__)
#define ADVFLOW_HD __host__ __device__ __forceinline__
#define ADVFLOW_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#define ADVFLOW_UNROLL _Pragma("unroll")
#else
#define ADVFLOW_UNROLL
// Always: CPU kernels inline these into functions built for wider vector units.
#define ADVFLOW_HD inline __attribute__((always_inline))
#endif

// A multiply-add whose rounding does not depend on what the compiler sees
// around it: two instantiations of one kernel must agree bit for bit. Host code
// leaves the choice to the compiler, which would otherwise call libm.
template <typename T>
ADVFLOW_HD T advflow_fma(T a, T b, T c) {
#if defined(__CUDA_ARCH__)
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}
