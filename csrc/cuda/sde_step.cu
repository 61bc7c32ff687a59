// One sampler step on CUDA: the next latent, the noise that explains it as it is
// stored, and the mean square of that noise.
//
// Reads v, x and, where it is given, noise once; writes x_next and eps once.
// Noise from seeds is made in registers and costs no traffic: a thread's eight
// elements are two Philox counters. As in residual.cu the inputs carry their
// dtypes at run time; a template knows only whether none of them is fp32, which
// halves the registers that loads wait in.
#include <cuda_runtime.h>

#include "common/macros.h"
#include "common/reduce.cuh"
#include "common/rows.cuh"
#include "common/vec.h"
#include "launchers.h"
#include "math/philox.h"
#include "math/sde_step.h"

namespace {

ADVFLOW_HD bool is_narrow(const AdvflowSdeStepInputs& in, bool drawn) {
  return in.v.dtype != ADVFLOW_FLOAT32 && in.x.dtype != ADVFLOW_FLOAT32 && in.dtype != ADVFLOW_FLOAT32 &&
         (drawn || in.noise.dtype != ADVFLOW_FLOAT32);
}

// What a row's elements have in common.
struct Step {
  float c_x, c_v, sigma, inverse_sigma;
  int64_t seed;
};

struct Raw {
  AdvflowRaw8 v, x, noise;
};

// Elements `i` to `i` + 7 of a row, from what was loaded of them.
template <bool kVector, bool kDrawn>
__device__ void step8(const AdvflowSdeStepInputs& in, const Step& step, const Raw& raw, int64_t row, int64_t i,
                      int valid, void* x_next, void* eps, float& sum) {
  const int64_t index = row * in.elements + i;
  const bool noisy = step.sigma != 0.0f;
  float v[kAdvflowVec], x[kAdvflowVec], mean[kAdvflowVec], next[kAdvflowVec];
  advflow_unpack8(raw.v, in.v.dtype, v);
  advflow_unpack8(raw.x, in.x.dtype, x);
#pragma unroll
  for (int k = 0; k < kAdvflowVec; ++k) next[k] = mean[k] = advflow_sde_mean(x[k], v[k], step.c_x, step.c_v);
  if (noisy) {
    float noise[kAdvflowVec];
    if (kDrawn) {
      advflow_normals(advflow_random_words(step.seed, i / kAdvflowNormals), noise);
      advflow_normals(advflow_random_words(step.seed, i / kAdvflowNormals + 1), noise + kAdvflowNormals);
    } else {
      advflow_unpack8(raw.noise, in.noise.dtype, noise);
    }
#pragma unroll
    for (int k = 0; k < kAdvflowVec; ++k) next[k] = advflow_sde_next(mean[k], step.sigma, noise[k]);
  }
  const AdvflowRaw8 rounded = advflow_pack8(next, in.dtype);
  // Both stored with the default policy: the next forward pass reads x_next.
  advflow_store8<kVector>(x_next, in.dtype, index, valid, rounded);

  float explained[kAdvflowVec] = {};
  if (noisy) {
    advflow_unpack8(rounded, in.dtype, next);
#pragma unroll
    for (int k = 0; k < kAdvflowVec; ++k) {
      explained[k] = advflow_sde_eps(next[k], mean[k], step.inverse_sigma);
      if (kVector || k < valid) sum = advflow_fma(explained[k], explained[k], sum);
    }
  }
  advflow_store8<kVector>(eps, in.dtype, index, valid, advflow_pack8(explained, in.dtype));
}

// partials[row][split]
template <bool kVector, bool kDrawn, bool kNarrow>
__global__ void __launch_bounds__(kAdvflowMaxThreads)
    sde_step_kernel(AdvflowSdeStepInputs in, AdvflowRowPlan plan, void* x_next, void* eps, float* partials) {
  if (kNarrow && !is_narrow(in, kDrawn)) __builtin_unreachable();
  // Tiles whose loads are in flight together. A thread then has 96 bytes under way whatever the dtype, and no more
  // registers for it: a word of 16 bits takes half of one.
  constexpr int kAhead = kVector && kNarrow ? 2 : 1;
  const int64_t row = blockIdx.x / unsigned(plan.splits);
  const int64_t split = blockIdx.x % unsigned(plan.splits);
  const int64_t begin = split * plan.split_elements;
  const int64_t end = min(begin + plan.split_elements, in.elements);

  const float* coef = static_cast<const float*>(in.coef) + row * 3;
  const float sigma = coef[2];
  const Step step = {coef[0], coef[1], sigma, 1.0f / sigma, kDrawn ? in.seeds[row] : 0};

  float sums[1] = {};
  for (int64_t first = begin + int64_t(threadIdx.x) * kAdvflowVec; first < end; first += kAhead * plan.tile) {
    Raw raw[kAhead];
#pragma unroll
    for (int t = 0; t < kAhead; ++t) {
      const int64_t i = first + t * plan.tile;
      if (i >= end) break;
      const int valid = advflow_valid_elements(i, end);
      raw[t].v = advflow_load8<kVector, true>(in.v, row, i, valid);
      raw[t].x = advflow_load8<kVector, true>(in.x, row, i, valid);
      if (!kDrawn && sigma != 0.0f) raw[t].noise = advflow_load8<kVector, true>(in.noise, row, i, valid);
    }
#pragma unroll
    for (int t = 0; t < kAhead; ++t) {
      const int64_t i = first + t * plan.tile;
      if (i >= end) break;
      const int valid = advflow_valid_elements(i, end);
      step8<kVector, kDrawn>(in, step, raw[t], row, i, valid, x_next, eps, sums[0]);
    }
  }

  const float total = advflow_block_sum(sums);
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

bool are_supported(const AdvflowSdeStepInputs& in) {
  return advflow_is_supported(in.v) && advflow_is_supported(in.x) && advflow_is_supported(in.noise) &&
         advflow_is_supported(in.dtype);
}

bool can_vectorize(const AdvflowSdeStepInputs& in, const void* x_next, const void* eps) {
  return in.elements % kAdvflowVec == 0 && advflow_is_aligned16(in.v) && advflow_is_aligned16(in.x) &&
         advflow_is_aligned16(in.noise) && advflow_is_aligned16(x_next) && advflow_is_aligned16(eps);
}

}  // namespace

int64_t advflow_sde_step_workspace_cuda(int64_t batch, int64_t elements) {
  return batch * advflow_plan_row(elements).splits * int64_t(sizeof(float));
}

int advflow_sde_step_cuda(const AdvflowSdeStepInputs* in, void* workspace, void* x_next, void* eps, void* eps_sq,
                          void* where) {
  if (!are_supported(*in)) return ADVFLOW_UNSUPPORTED_DTYPE;
  if (in->batch == 0) return ADVFLOW_OK;
  const AdvflowRowPlan plan = advflow_plan_row(in->elements);
  const int64_t blocks = in->batch * plan.splits;
  if (!advflow_fits_grid(blocks)) return -int(cudaErrorInvalidConfiguration);

  const cudaStream_t stream = static_cast<cudaStream_t>(where);
  float* partials = static_cast<float*>(workspace);
  advflow_with_bool(can_vectorize(*in, x_next, eps), [&](auto vector) {
    advflow_with_bool(in->seeds != nullptr, [&](auto drawn) {
      advflow_with_bool(is_narrow(*in, drawn), [&](auto narrow) {
        const auto kernel = sde_step_kernel<decltype(vector)::value, decltype(drawn)::value, decltype(narrow)::value>;
        ADVFLOW_LAUNCH(kernel, dim3(unsigned(blocks)), dim3(plan.threads), stream, *in, plan, x_next, eps, partials);
      });
    });
  });
  const int status = advflow_last_error();
  if (status != ADVFLOW_OK) return status;
  return advflow_launch_row_means<1>(partials, static_cast<float*>(eps_sq), in->batch, plan, in->elements, stream);
}
