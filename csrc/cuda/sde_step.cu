// One sampler step on CUDA: the next latent, the noise that explains it as it is
// stored, and the mean square of sigma times that noise; and the last two of a latent
// that was stored before.
//
// Reads v, x and, where it is given, noise or x_next once; writes x_next and eps once.
// Noise from seeds is made in registers and costs no traffic: a thread's eight
// elements are two Philox counters. As in residual.cu the inputs carry their
// dtypes at run time; a template knows only whether none of them is fp32, which
// halves the registers that loads wait in.
#include <cuda_runtime.h>

#include "common/launch.cuh"
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

__device__ float rounded(float value, AdvflowDtype dtype) {
  if (dtype == ADVFLOW_FLOAT32) return value;
  if (dtype == ADVFLOW_BFLOAT16) return advflow_bf16_to_float(advflow_float_to_bf16(value));
  return advflow_fp16_to_float(advflow_float_to_fp16(value));
}

// Elements `i` to `i` + 7 of a row, from what was loaded of them: four at a time, the normals of one counter, so that
// few numbers wait in registers.
template <bool kVector, bool kDrawn, bool kNarrow>
__device__ void step8(const AdvflowSdeStepInputs& in, const Step& step, const Raw& raw, int64_t row, int64_t i,
                      int valid, void* x_next, void* eps, double& sum) {
  const int64_t index = row * in.elements + i;
  const bool noisy = step.sigma != 0.0f;
  float v[kAdvflowVec], x[kAdvflowVec], noise[kAdvflowVec], next[kAdvflowVec], explained[kAdvflowVec] = {};
  advflow_unpack8(raw.v, in.v.dtype, v);
  advflow_unpack8(raw.x, in.x.dtype, x);
  if (!kDrawn && noisy) advflow_unpack8(raw.noise, in.noise.dtype, noise);
#pragma unroll
  for (int first = 0; first < kAdvflowVec; first += kAdvflowNormals) {
    if (kDrawn && noisy) advflow_normals(advflow_random_words(step.seed, (i + first) / kAdvflowNormals), noise + first);
#pragma unroll
    for (int k = first; k < first + kAdvflowNormals; ++k) {
      const float mean = advflow_sde_mean(x[k], v[k], step.c_x, step.c_v);
      next[k] = rounded(noisy ? advflow_sde_next(mean, step.sigma, noise[k]) : mean, in.dtype);
      if (!noisy) continue;
      const float deviation = advflow_sde_deviation(next[k], x[k], v[k], step.c_x, step.c_v);
      if (kVector || k < valid) sum = advflow_add_square(deviation, sum);
      explained[k] = deviation * step.inverse_sigma;
    }
  }
  // On an H200 streamed stores gained 6 % in fp32 once and nothing the next time, and cost 2 % where eps alone is fp32.
  constexpr bool kStreaming = !kNarrow;
  advflow_store8<kVector, kStreaming>(x_next, in.dtype, index, valid, advflow_pack8(next, in.dtype));
  advflow_store8<kVector, kStreaming>(eps, ADVFLOW_FLOAT32, index, valid, advflow_pack8(explained, ADVFLOW_FLOAT32));
}

// partials[row][split]. Unaligned and given its noise it would take more registers than three blocks have; the others
// take fewer when they are not asked for anything.
template <bool kVector, bool kDrawn, bool kNarrow>
__global__ void __launch_bounds__(kAdvflowMaxThreads, kVector || kDrawn ? 0 : 3)
    sde_step_kernel(AdvflowSdeStepInputs in, AdvflowRowPlan plan, void* x_next, void* eps, double* partials) {
  advflow_let_next_begin();
  if (kNarrow && !is_narrow(in, kDrawn)) __builtin_unreachable();
  const int64_t row = blockIdx.x / unsigned(plan.splits);
  const int64_t split = blockIdx.x % unsigned(plan.splits);
  const int64_t begin = split * plan.split_elements;
  const int64_t end = min(begin + plan.split_elements, in.elements);

  const float* coef = static_cast<const float*>(in.coef) + row * 3;
  const float sigma = coef[2];
  const Step step = {coef[0], coef[1], sigma, 1.0f / sigma, kDrawn ? in.seeds[row] : 0};

  double sums[1] = {};
  for (int64_t i = begin + int64_t(threadIdx.x) * kAdvflowVec; i < end; i += plan.tile) {
    const int valid = advflow_valid_elements(i, end);
    Raw raw;
    raw.v = advflow_load8<kVector, true>(in.v, row, i, valid);
    raw.x = advflow_load8<kVector, true>(in.x, row, i, valid);
    if (!kDrawn && sigma != 0.0f) raw.noise = advflow_load8<kVector, true>(in.noise, row, i, valid);
    step8<kVector, kDrawn, kNarrow>(in, step, raw, row, i, valid, x_next, eps, sums[0]);
  }

  const double total = advflow_block_sum(sums);
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

// A thread's eight elements of a stored transition: in the order of the step's, whose bits these are.
template <bool kVector>
__device__ void deviation8(const AdvflowTransitionInputs& in, const Step& step, int64_t row, int64_t i, int valid,
                           float* deviation) {
  const AdvflowRaw8 raw_v = advflow_load8<kVector, true>(in.v, row, i, valid);
  const AdvflowRaw8 raw_x = advflow_load8<kVector, true>(in.x, row, i, valid);
  const AdvflowRaw8 raw_next = advflow_load8<kVector, true>(in.x_next, row, i, valid);
  float v[kAdvflowVec], x[kAdvflowVec], next[kAdvflowVec];
  advflow_unpack8(raw_v, in.v.dtype, v);
  advflow_unpack8(raw_x, in.x.dtype, x);
  advflow_unpack8(raw_next, in.x_next.dtype, next);
#pragma unroll
  for (int k = 0; k < kAdvflowVec; ++k) deviation[k] = advflow_sde_deviation(next[k], x[k], v[k], step.c_x, step.c_v);
}

__device__ Step step_of(const AdvflowTransitionInputs& in, int64_t row) {
  const float* coef = static_cast<const float*>(in.coef) + row * 3;
  return {coef[0], coef[1], coef[2], 1.0f / coef[2], 0};
}

// partials[row][split]
template <bool kVector>
__global__ void __launch_bounds__(kAdvflowMaxThreads)
    transition_deviation_sq_kernel(AdvflowTransitionInputs in, AdvflowRowPlan plan, double* partials) {
  advflow_let_next_begin();
  const int64_t row = blockIdx.x / unsigned(plan.splits);
  const int64_t split = blockIdx.x % unsigned(plan.splits);
  const int64_t begin = split * plan.split_elements;
  const int64_t end = min(begin + plan.split_elements, in.elements);
  const Step step = step_of(in, row);

  double sums[1] = {};
  if (step.sigma != 0.0f) {
    for (int64_t i = begin + int64_t(threadIdx.x) * kAdvflowVec; i < end; i += plan.tile) {
      const int valid = advflow_valid_elements(i, end);
      float deviation[kAdvflowVec];
      deviation8<kVector>(in, step, row, i, valid, deviation);
#pragma unroll
      for (int k = 0; k < kAdvflowVec; ++k) {
        if (kVector || k < valid) sums[0] = advflow_add_square(deviation[k], sums[0]);
      }
    }
  }

  const double total = advflow_block_sum(sums);
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

template <bool kVector>
__global__ void __launch_bounds__(kAdvflowMaxThreads)
    transition_deviation_kernel(AdvflowTransitionInputs in, AdvflowRowPlan plan, void* out) {
  const int64_t row = blockIdx.x / unsigned(plan.tiles);
  const int64_t tile = blockIdx.x % unsigned(plan.tiles);
  const int64_t i = tile * plan.tile + int64_t(threadIdx.x) * kAdvflowVec;
  if (i >= in.elements) return;
  const int valid = advflow_valid_elements(i, in.elements);
  const Step step = step_of(in, row);
  const float weight =
      in.weight.data ? static_cast<const float*>(in.weight.data)[row * in.weight.stride] : step.inverse_sigma;

  // A row without a weight is not even read: its latents may be anything.
  float deviation[kAdvflowVec] = {};
  if (step.sigma != 0.0f && weight != 0.0f) {
    deviation8<kVector>(in, step, row, i, valid, deviation);
#pragma unroll
    for (int k = 0; k < kAdvflowVec; ++k) deviation[k] *= weight;
  }
  advflow_store8<kVector>(out, in.dtype, row * in.elements + i, valid, advflow_pack8(deviation, in.dtype));
}

bool are_supported(const AdvflowSdeStepInputs& in) {
  return advflow_is_supported(in.v) && advflow_is_supported(in.x) && advflow_is_supported(in.noise) &&
         advflow_is_supported(in.dtype);
}

bool can_vectorize(const AdvflowSdeStepInputs& in, const void* x_next, const void* eps) {
  return in.elements % kAdvflowPair == 0 && advflow_is_aligned16(in.v) && advflow_is_aligned16(in.x) &&
         advflow_is_aligned16(in.noise) && advflow_is_aligned16(x_next) && advflow_is_aligned16(eps);
}

bool are_supported(const AdvflowTransitionInputs& in) {
  return advflow_is_supported(in.v) && advflow_is_supported(in.x) && advflow_is_supported(in.x_next) &&
         advflow_is_supported(in.dtype);
}

bool can_vectorize(const AdvflowTransitionInputs& in, const void* out) {
  return in.elements % kAdvflowPair == 0 && advflow_is_aligned16(in.v) && advflow_is_aligned16(in.x) &&
         advflow_is_aligned16(in.x_next) && advflow_is_aligned16(out);
}

}  // namespace

int64_t advflow_sde_step_workspace_cuda(int64_t batch, int64_t elements) {
  return batch * advflow_plan_row(elements).splits * int64_t(sizeof(double));
}

int advflow_sde_step_cuda(const AdvflowSdeStepInputs* in, void* workspace, void* x_next, void* eps, void* deviation_sq,
                          void* where) {
  if (!are_supported(*in)) return ADVFLOW_UNSUPPORTED_DTYPE;
  if (in->batch == 0) return ADVFLOW_OK;
  const AdvflowRowPlan plan = advflow_plan_row(in->elements);
  const int64_t blocks = in->batch * plan.splits;
  if (!advflow_fits_grid(blocks)) return -int(cudaErrorInvalidConfiguration);

  const cudaStream_t stream = static_cast<cudaStream_t>(where);
  double* partials = static_cast<double*>(workspace);
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
  return advflow_launch_row_means<1>(partials, static_cast<double*>(deviation_sq), in->batch, plan, in->elements,
                                     stream);
}

int64_t advflow_transition_deviation_sq_workspace_cuda(int64_t batch, int64_t elements) {
  return advflow_sde_step_workspace_cuda(batch, elements);
}

int advflow_transition_deviation_sq_cuda(const AdvflowTransitionInputs* in, void* workspace, void* deviation_sq,
                                         void* where) {
  if (!are_supported(*in)) return ADVFLOW_UNSUPPORTED_DTYPE;
  if (in->batch == 0) return ADVFLOW_OK;
  const AdvflowRowPlan plan = advflow_plan_row(in->elements);
  const int64_t blocks = in->batch * plan.splits;
  if (!advflow_fits_grid(blocks)) return -int(cudaErrorInvalidConfiguration);

  const cudaStream_t stream = static_cast<cudaStream_t>(where);
  double* partials = static_cast<double*>(workspace);
  advflow_with_bool(can_vectorize(*in, nullptr), [&](auto vector) {
    const auto kernel = transition_deviation_sq_kernel<decltype(vector)::value>;
    ADVFLOW_LAUNCH(kernel, dim3(unsigned(blocks)), dim3(plan.threads), stream, *in, plan, partials);
  });
  const int status = advflow_last_error();
  if (status != ADVFLOW_OK) return status;
  return advflow_launch_row_means<1>(partials, static_cast<double*>(deviation_sq), in->batch, plan, in->elements,
                                     stream);
}

int advflow_transition_deviation_cuda(const AdvflowTransitionInputs* in, void* out, void* where) {
  if (!are_supported(*in)) return ADVFLOW_UNSUPPORTED_DTYPE;
  if (in->batch == 0 || in->elements == 0) return ADVFLOW_OK;
  const AdvflowRowPlan plan = advflow_plan_row(in->elements);
  const int64_t blocks = in->batch * plan.tiles;
  if (!advflow_fits_grid(blocks)) return -int(cudaErrorInvalidConfiguration);

  advflow_with_bool(can_vectorize(*in, out), [&](auto vector) {
    const auto kernel = transition_deviation_kernel<decltype(vector)::value>;
    ADVFLOW_LAUNCH(kernel, dim3(unsigned(blocks)), dim3(plan.threads), static_cast<cudaStream_t>(where), *in, plan,
                   out);
  });
  return advflow_last_error();
}
