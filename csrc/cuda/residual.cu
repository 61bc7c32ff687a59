// The loss core on CUDA: the statistics of a row, and the gradient.
//
// Both kernels are bound by memory, so what matters is how often each tensor
// crosses the bus. Eager PyTorch writes and rereads every residual and its
// square; here u = noise - x0 and all residuals live in registers:
//
//   residual_stats   reads v, target, noise, v_old, v_ref once; writes 32 bytes
//                    a row (and 32 a block, read back by the kernel that finishes them)
//   residual_grad    reads them once more, writes the gradient once
//
// Recomputing the residuals in the second kernel moves as many bytes as
// stashing a gradient in the first and rescaling it would, and it keeps nothing
// alive between forward and backward.
//
// Inputs carry their own dtypes at run time. All kernels branch on them, the
// same way in every thread, because a template for each mixture would mean
// 3^5 of each kernel. What is a template is what changes the loop: 16-byte or
// element access, and which tensors are present.
#include <cuda_runtime.h>

#include <type_traits>

#include "common/launch.cuh"
#include "common/macros.h"
#include "common/reduce.cuh"
#include "common/rows.cuh"
#include "common/vec.h"
#include "launchers.h"
#include "math/residual.h"

namespace {

// ---------------------------------------------------------------------------
// Kernels

template <bool kVector, AdvflowTarget kTarget, bool kHasOld, bool kHasRef>
struct Variant {
  static constexpr bool vector = kVector;
  static constexpr bool noise = kTarget == ADVFLOW_TARGET_X0;
  static constexpr bool eps = kTarget == ADVFLOW_TARGET_EPS;
  static constexpr bool old = kHasOld;
  static constexpr bool ref = kHasRef;
  // Blocks a multiprocessor holds at least; 0 leaves it to the compiler, which
  // spills some element-wise variants to fit a fourth.
  static constexpr int min_blocks = kVector ? 0 : 3;
};

struct Loaded {
  AdvflowRaw8 v, target, noise, old, ref;
};

struct Residuals8 {
  float v[kAdvflowVec], u[kAdvflowVec], o[kAdvflowVec], p[kAdvflowVec];
};

// Elements past `valid` read as zero in every tensor, which adds exactly
// nothing to any sum.
template <typename V, bool kLastUse>
__device__ Loaded load(const AdvflowResidualInputs& in, int64_t row, int64_t i, int valid) {
  Loaded raw;
  raw.v = advflow_load8<V::vector, kLastUse>(in.v, row, i, valid);
  raw.target = advflow_load8<V::vector, kLastUse>(in.target, row, i, valid);
  if (V::noise) raw.noise = advflow_load8<V::vector, kLastUse>(in.noise, row, i, valid);
  if (V::old) raw.old = advflow_load8<V::vector, kLastUse>(in.v_old, row, i, valid);
  if (V::ref) raw.ref = advflow_load8<V::vector, kLastUse>(in.v_ref, row, i, valid);
  return raw;
}

template <typename V>
__device__ Residuals8 residuals(const AdvflowResidualInputs& in, const Loaded& raw) {
  Residuals8 x = {};
  advflow_unpack8(raw.v, in.v.dtype, x.v);
  advflow_unpack8(raw.target, in.target.dtype, x.u);
  if (V::noise) {
    float n[kAdvflowVec];
    advflow_unpack8(raw.noise, in.noise.dtype, n);
#pragma unroll
    for (int k = 0; k < kAdvflowVec; ++k) x.u[k] = n[k] - x.u[k];
  }
  if (V::old) advflow_unpack8(raw.old, in.v_old.dtype, x.o);
  if (V::ref) advflow_unpack8(raw.ref, in.v_ref.dtype, x.p);
  return x;
}

// partials[row][split][stat]
template <typename V>
__global__ void __launch_bounds__(kAdvflowMaxThreads, V::min_blocks)
    residual_stats_kernel(AdvflowResidualInputs in, AdvflowRowPlan plan, float* partials) {
  advflow_await_previous();
  advflow_let_next_begin();
  const int64_t row = blockIdx.x / unsigned(plan.splits);
  const int64_t split = blockIdx.x % unsigned(plan.splits);
  const int64_t begin = split * plan.split_elements;
  const int64_t end = min(begin + plan.split_elements, in.elements);

  const float mix = in.mixes.data ? static_cast<const float*>(in.mixes.data)[row * in.mixes.stride] : float(in.mix);
  float sums[ADVFLOW_RESIDUAL_STATS] = {};
  for (int64_t i = begin + int64_t(threadIdx.x) * kAdvflowVec; i < end; i += plan.tile) {
    const Residuals8 x = residuals<V>(in, load<V, false>(in, row, i, advflow_valid_elements(i, end)));
#pragma unroll
    for (int k = 0; k < kAdvflowVec; ++k) {
      advflow_residual_accumulate<V::eps, V::old, V::ref>(x.v[k], x.u[k], x.o[k], x.p[k], mix, sums);
    }
  }

  const float total = advflow_block_sum(sums);
  if (threadIdx.x < ADVFLOW_RESIDUAL_STATS) {
    partials[int64_t(blockIdx.x) * ADVFLOW_RESIDUAL_STATS + threadIdx.x] = total;
  }
}

template <typename V>
__global__ void __launch_bounds__(kAdvflowMaxThreads)
    residual_grad_kernel(AdvflowResidualInputs in, AdvflowRowPlan plan, const float* coef, AdvflowColumn upstream,
                         void* grad, float scale) {
  advflow_await_previous();
  const int64_t row = blockIdx.x / unsigned(plan.tiles);
  const int64_t tile = blockIdx.x % unsigned(plan.tiles);
  const int64_t i = tile * plan.tile + int64_t(threadIdx.x) * kAdvflowVec;
  if (i >= in.elements) return;
  const int valid = advflow_valid_elements(i, in.elements);
  // A row whose coefficients are zero may hold anything: waiting for them first would cost more than to read it.
  const Loaded raw = load<V, true>(in, row, i, valid);
  const float weight = advflow_upstream<float>(upstream, row);
  const float a = advflow_scaled(coef[row * 3], weight);
  const float b = advflow_scaled(coef[row * 3 + 1], weight);
  const float c = advflow_scaled(coef[row * 3 + 2], weight);
  const Residuals8 x = residuals<V>(in, raw);

  float out[kAdvflowVec];
#pragma unroll
  for (int k = 0; k < kAdvflowVec; ++k) {
    out[k] = scale * advflow_residual_combine<V::eps, V::old, V::ref>(x.v[k], x.u[k], x.o[k], x.p[k], a, b, c);
  }
  // Stored with the default policy: the next kernel of the backward reads it.
  advflow_store8<V::vector>(grad, in.v.dtype, row * in.elements + i, valid, advflow_pack8(out, in.v.dtype));
}

// ---------------------------------------------------------------------------
// Launchers

bool are_supported(const AdvflowResidualInputs& in) {
  return advflow_is_supported(in.v) && advflow_is_supported(in.target) && advflow_is_supported(in.noise) &&
         advflow_is_supported(in.v_old) && advflow_is_supported(in.v_ref);
}

bool can_vectorize(const AdvflowResidualInputs& in, const void* grad) {
  return in.elements % kAdvflowPair == 0 && advflow_is_aligned16(in.v) && advflow_is_aligned16(in.target) &&
         advflow_is_aligned16(in.noise) && advflow_is_aligned16(in.v_old) && advflow_is_aligned16(in.v_ref) &&
         advflow_is_aligned16(grad);
}

template <typename F>
void with_target(AdvflowTarget target, F f) {
  switch (target) {
    case ADVFLOW_TARGET_U:
      return f(std::integral_constant<AdvflowTarget, ADVFLOW_TARGET_U>{});
    case ADVFLOW_TARGET_X0:
      return f(std::integral_constant<AdvflowTarget, ADVFLOW_TARGET_X0>{});
    case ADVFLOW_TARGET_EPS:
      return f(std::integral_constant<AdvflowTarget, ADVFLOW_TARGET_EPS>{});
  }
}

// Calls f(Variant<...>{}) for what `in` holds.
template <typename F>
void with_variant(const AdvflowResidualInputs& in, const void* grad, F f) {
  advflow_with_bool(can_vectorize(in, grad), [&](auto vector) {
    with_target(in.target_is, [&](auto target) {
      advflow_with_bool(in.v_old.data != nullptr, [&](auto old) {
        advflow_with_bool(in.v_ref.data != nullptr, [&](auto ref) {
          f(Variant<decltype(vector)::value, decltype(target)::value, decltype(old)::value, decltype(ref)::value>{});
        });
      });
    });
  });
}

}  // namespace

int64_t advflow_residual_stats_workspace_cuda(int64_t batch, int64_t elements) {
  return batch * advflow_plan_row(elements).splits * ADVFLOW_RESIDUAL_STATS * int64_t(sizeof(float));
}

int advflow_residual_partials_cuda(const AdvflowResidualInputs* in, void* workspace, void* where) {
  if (!are_supported(*in)) return ADVFLOW_UNSUPPORTED_DTYPE;
  if (in->batch == 0) return ADVFLOW_OK;
  const AdvflowRowPlan plan = advflow_plan_row(in->elements);
  const int64_t blocks = in->batch * plan.splits;
  if (!advflow_fits_grid(blocks)) return -int(cudaErrorInvalidConfiguration);

  with_variant(*in, nullptr, [&](auto variant) {
    constexpr auto kernel = residual_stats_kernel<decltype(variant)>;
    ADVFLOW_LAUNCH_EARLY(kernel, dim3(unsigned(blocks)), dim3(plan.threads), static_cast<cudaStream_t>(where), *in,
                         plan, static_cast<float*>(workspace));
  });
  return advflow_last_error();
}

int advflow_residual_stats_cuda(const AdvflowResidualInputs* in, void* workspace, void* stats, void* where) {
  const int status = advflow_residual_partials_cuda(in, workspace, where);
  if (status != ADVFLOW_OK || in->batch == 0) return status;
  return advflow_launch_row_means<ADVFLOW_RESIDUAL_STATS>(
      static_cast<const float*>(workspace), static_cast<float*>(stats), in->batch, advflow_plan_row(in->elements),
      in->elements, static_cast<cudaStream_t>(where));
}

int advflow_residual_grad_cuda(const AdvflowResidualInputs* in, const void* coef, const AdvflowColumn* upstream,
                               void* grad, void* where) {
  if (!are_supported(*in)) return ADVFLOW_UNSUPPORTED_DTYPE;
  if (in->batch == 0 || in->elements == 0) return ADVFLOW_OK;
  const AdvflowRowPlan plan = advflow_plan_row(in->elements);
  const int64_t blocks = in->batch * plan.tiles;
  if (!advflow_fits_grid(blocks)) return -int(cudaErrorInvalidConfiguration);

  const cudaStream_t stream = static_cast<cudaStream_t>(where);
  const float scale = float(2.0 / double(in->elements));
  with_variant(*in, grad, [&](auto variant) {
    constexpr auto kernel = residual_grad_kernel<decltype(variant)>;
    ADVFLOW_LAUNCH_EARLY(kernel, dim3(unsigned(blocks)), dim3(plan.threads), stream, *in, plan,
                         static_cast<const float*>(coef), *upstream, grad, scale);
  });
  return advflow_last_error();
}
