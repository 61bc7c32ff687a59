// The bridge between torch glue and kernels: plain pointers and sizes only, so
// that neither side sees the other's headers. For every op the CPU and the
// CUDA launcher have the same signature and the same meaning.
//
// All tensors are contiguous. Offsets are 64-bit. `where` says where the work
// runs: a cudaStream_t for a *_cuda launcher, a const AdvflowParallelFor* for a
// *_cpu one (so that the CPU kernels use the caller's thread pool).
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/status.h"

// C linkage, so that a test can call a launcher through ctypes.
extern "C" {

struct AdvflowTensor {
  const void* data;  // null: this input is absent
  AdvflowDtype dtype;
};

// Runs body(context, begin, end) over a partition of [0, count).
struct AdvflowParallelFor {
  void (*run)(int64_t count, void (*body)(void* context, int64_t begin, int64_t end), void* context);
};

// The tensors of one forward-process training batch, each [batch, elements].
struct AdvflowResidualInputs {
  AdvflowTensor v;       // policy velocity
  AdvflowTensor target;  // x0 when noise is present, otherwise u itself
  AdvflowTensor noise;   // u = noise - x0, formed in registers
  AdvflowTensor v_old;   // rollout-policy velocity, may be absent
  AdvflowTensor v_ref;   // reference velocity, may be absent
  int64_t batch;
  int64_t elements;
};

// residual_stats: stats[batch, ADVFLOW_RESIDUAL_STATS], see math/residual.h.
// fp32, or fp64 when any input is fp64; 0 where a statistic needs an absent
// tensor. The value of a row depends on that row's data and on `elements`
// alone: not on batch, position, threads, or the alignment of the pointers.
int64_t advflow_residual_stats_workspace_cpu(int64_t batch, int64_t elements);  // bytes
int64_t advflow_residual_stats_workspace_cuda(int64_t batch, int64_t elements);
int advflow_residual_stats_cpu(const AdvflowResidualInputs* in, void* workspace, void* stats, void* where);
int advflow_residual_stats_cuda(const AdvflowResidualInputs* in, void* workspace, void* stats, void* where);

// residual_grad: grad[batch, elements] in v's dtype, rounded once,
//   grad = (2 / elements) * (a (v - u) + b (v - v_old) + c (v - v_ref))
// with coef[batch, 3] = (a, b, c) in the accumulate type (fp32, or fp64 when
// any input is fp64). A row whose three coefficients are all zero is written
// as exact zeros whatever its inputs hold. A zero coefficient never reads NaN
// into the result.
int advflow_residual_grad_cpu(const AdvflowResidualInputs* in, const void* coef, void* grad, void* where);
int advflow_residual_grad_cuda(const AdvflowResidualInputs* in, const void* coef, void* grad, void* where);

}  // extern "C"
