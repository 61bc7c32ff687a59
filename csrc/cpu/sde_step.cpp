// One sampler step on the CPU: the next latent, the noise that explains it as it
// is stored, and the mean square of sigma times that noise; and the last two of a
// latent that was stored before.
#include "math/sde_step.h"

#include <cstdint>
#include <cstring>

#include "common/rows.h"
#include "launchers.h"
#include "math/philox.h"

namespace {

static_assert(kAdvflowTile % kAdvflowNormals == 0 && kAdvflowChunk % kAdvflowTile == 0, "a tile begins at a counter");

struct Outputs {
  void* x_next;
  void* eps;
  double* sums;  // [batch * chunks], of squared deviations
};

// Noise of the tile that begins at element `first` of its row, in three loops:
// square roots may set errno, so they are not vectorized, and would keep the
// rest from it.
template <typename T>
ADVFLOW_INLINE void draw_tile(int64_t seed, int64_t first, int64_t count, T* noise) {
  constexpr int64_t kPairs = kAdvflowTile / 2;
  alignas(64) float radius[kPairs], normals[kAdvflowTile];
  alignas(64) uint32_t angle[kPairs];
  const int64_t counters = (count + kAdvflowNormals - 1) / kAdvflowNormals;
  for (int64_t i = 0; i < counters; ++i) {
    const AdvflowPhilox random = advflow_random_words(seed, first / kAdvflowNormals + i);
    radius[2 * i] = advflow_squared_radius(random.word[0]);
    radius[2 * i + 1] = advflow_squared_radius(random.word[2]);
    angle[2 * i] = random.word[1];
    angle[2 * i + 1] = random.word[3];
  }
  for (int64_t i = 0; i < 2 * counters; ++i) radius[i] = std::sqrt(radius[i]);
  for (int64_t i = 0; i < 2 * counters; ++i) advflow_point_on_circle(radius[i], angle[i], normals + 2 * i);
  for (int64_t i = 0; i < count; ++i) noise[i] = T(normals[i]);
}

// The squares of a tile, whose last lanes may lie past `count` and are overwritten.
template <typename T>
ADVFLOW_INLINE void add_squares(T* deviation, int64_t count, AdvflowLanes<double>& sums) {
  for (int64_t i = count; i % kAdvflowLanes != 0; ++i) deviation[i] = T(0);
  AdvflowLanes<double> tile = {};
  for (int64_t i = 0; i < count; i += kAdvflowLanes) {
    const auto narrow = AdvflowLanes<T>::load(deviation + i, kAdvflowLanes);
    const AdvflowLanes<double> d = {__builtin_convertvector(narrow.x, AdvflowLanes<double>::Vector)};
    tile += d * d;
  }
  sums += tile;
}

template <typename T>
ADVFLOW_INLINE void step_any(const AdvflowSdeStepInputs& in, const Outputs& out, int64_t chunk, int64_t row,
                             int64_t begin, int64_t end) {
  alignas(64) T scratch_v[kAdvflowTile], scratch_x[kAdvflowTile], scratch_noise[kAdvflowTile];
  alignas(64) T mean[kAdvflowTile], next[kAdvflowTile], deviation[kAdvflowTile];
  const T* coef = static_cast<const T*>(in.coef) + row * 3;
  const T c_x = coef[0], c_v = coef[1], sigma = coef[2];
  const T inverse_sigma = T(1) / sigma;
  AdvflowLanes<double> sums = {};
  for (int64_t first = begin; first < end; first += kAdvflowTile) {
    const int64_t count = end - first < kAdvflowTile ? end - first : kAdvflowTile;
    const int64_t index = row * in.elements + first;
    const T* v = advflow_read_tile(in.v, row, first, count, scratch_v);
    const T* x = advflow_read_tile(in.x, row, first, count, scratch_x);
    for (int64_t i = 0; i < count; ++i) mean[i] = advflow_sde_mean(x[i], v[i], c_x, c_v);
    if (sigma == T(0)) {
      advflow_write_tile(mean, out.x_next, in.dtype, index, count);
      std::memset(static_cast<T*>(out.eps) + index, 0, size_t(count) * sizeof(T));
      continue;
    }
    const T* noise = scratch_noise;
    if (in.seeds) {
      draw_tile(in.seeds[row], first, count, scratch_noise);
    } else {
      noise = advflow_read_tile(in.noise, row, first, count, scratch_noise);
    }
    for (int64_t i = 0; i < count; ++i) next[i] = advflow_sde_next(mean[i], sigma, noise[i]);
    advflow_write_tile(next, out.x_next, in.dtype, index, count);
    const T* stored = advflow_read_tile({out.x_next, in.elements, in.dtype}, row, first, count, next);
    for (int64_t i = 0; i < count; ++i) deviation[i] = advflow_sde_deviation(stored[i], x[i], v[i], c_x, c_v);
    add_squares(deviation, count, sums);
    T* eps = static_cast<T*>(out.eps) + index;
    for (int64_t i = 0; i < count; ++i) eps[i] = deviation[i] * inverse_sigma;
  }
  out.sums[chunk] = sums.sum();
}

// A piece of a row of a stored transition: its weighted deviation where `written` is given, and the sum of its squares
// where `sum` is.
template <typename T>
ADVFLOW_INLINE void explain_any(const AdvflowTransitionInputs& in, void* written, double* sum, int64_t row,
                                int64_t begin, int64_t end) {
  alignas(64) T scratch_v[kAdvflowTile], scratch_x[kAdvflowTile], scratch_next[kAdvflowTile];
  alignas(64) T deviation[kAdvflowTile];
  const T* coef = static_cast<const T*>(in.coef) + row * 3;
  const T c_x = coef[0], c_v = coef[1], sigma = coef[2];
  const T weight = in.weight.data ? static_cast<const T*>(in.weight.data)[row * in.weight.stride] : T(1) / sigma;
  AdvflowLanes<double> sums = {};
  if (sigma == T(0) || (written && weight == T(0))) {
    if (sum) *sum = 0.0;
    if (!written) return;
    const int64_t size = advflow_item_size(in.dtype);
    std::memset(static_cast<char*>(written) + (row * in.elements + begin) * size, 0, size_t((end - begin) * size));
    return;
  }
  for (int64_t first = begin; first < end; first += kAdvflowTile) {
    const int64_t count = end - first < kAdvflowTile ? end - first : kAdvflowTile;
    const T* v = advflow_read_tile(in.v, row, first, count, scratch_v);
    const T* x = advflow_read_tile(in.x, row, first, count, scratch_x);
    const T* stored = advflow_read_tile(in.x_next, row, first, count, scratch_next);
    for (int64_t i = 0; i < count; ++i) deviation[i] = advflow_sde_deviation(stored[i], x[i], v[i], c_x, c_v);
    if (sum) add_squares(deviation, count, sums);
    if (!written) continue;
    for (int64_t i = 0; i < count; ++i) deviation[i] *= weight;
    advflow_write_tile(deviation, written, in.dtype, row * in.elements + first, count);
  }
  if (sum) *sum = sums.sum();
}

template <typename T>
struct Kernels {
  void (*step)(const AdvflowSdeStepInputs&, const Outputs&, int64_t chunk, int64_t row, int64_t begin, int64_t end);
  void (*explain)(const AdvflowTransitionInputs&, void* written, double* sum, int64_t row, int64_t begin, int64_t end);
};

#define ADVFLOW_KERNEL_FOR(suffix, T, target)                                                               \
  target void step_##suffix(const AdvflowSdeStepInputs& in, const Outputs& out, int64_t chunk, int64_t row, \
                            int64_t begin, int64_t end) {                                                   \
    step_any<T>(in, out, chunk, row, begin, end);                                                           \
  }                                                                                                         \
  target void explain_##suffix(const AdvflowTransitionInputs& in, void* written, double* sum, int64_t row,  \
                               int64_t begin, int64_t end) {                                                \
    explain_any<T>(in, written, sum, row, begin, end);                                                      \
  }

ADVFLOW_KERNEL_FOR(baseline, float, )
ADVFLOW_KERNEL_FOR(double, double, )
#if defined(__x86_64__)
ADVFLOW_KERNEL_FOR(avx2, float, ADVFLOW_AVX2)
ADVFLOW_KERNEL_FOR(avx512, float, ADVFLOW_AVX512)
#endif

Kernels<double> kernels(double) { return {step_double, explain_double}; }

Kernels<float> kernels(float) {
#if defined(__x86_64__)
  if (advflow_has_avx512()) return {step_avx512, explain_avx512};
  if (advflow_has_avx2()) return {step_avx2, explain_avx2};
#endif
  return {step_baseline, explain_baseline};
}

bool is_double(const AdvflowTensor& tensor) { return tensor.data && tensor.dtype == ADVFLOW_FLOAT64; }

bool any_double(const AdvflowSdeStepInputs& in) {
  return is_double(in.v) || is_double(in.x) || is_double(in.noise) || in.dtype == ADVFLOW_FLOAT64;
}

bool any_double(const AdvflowTransitionInputs& in) {
  return is_double(in.v) || is_double(in.x) || is_double(in.x_next) || in.dtype == ADVFLOW_FLOAT64;
}

template <typename T>
void run_step(const AdvflowSdeStepInputs& in, const Outputs& out, void* where) {
  const Kernels<T> kernel = kernels(T());
  advflow_for_each_chunk(in.batch, in.elements, where, [&](int64_t chunk, int64_t row, int64_t begin, int64_t end) {
    kernel.step(in, out, chunk, row, begin, end);
  });
}

template <typename T>
void run_explain(const AdvflowTransitionInputs& in, void* written, double* sums, void* where) {
  const Kernels<T> kernel = kernels(T());
  advflow_for_each_chunk(in.batch, in.elements, where, [&](int64_t chunk, int64_t row, int64_t begin, int64_t end) {
    kernel.explain(in, written, sums ? sums + chunk : nullptr, row, begin, end);
  });
}

void explain(const AdvflowTransitionInputs& in, void* written, double* sums, void* where) {
  if (any_double(in)) return run_explain<double>(in, written, sums, where);
  run_explain<float>(in, written, sums, where);
}

}  // namespace

int64_t advflow_sde_step_workspace_cpu(int64_t batch, int64_t elements) {
  return batch * advflow_chunks_of(elements) * int64_t(sizeof(double));
}

int advflow_sde_step_cpu(const AdvflowSdeStepInputs* in, void* workspace, void* x_next, void* eps, void* deviation_sq,
                         void* where) {
  const Outputs out = {x_next, eps, static_cast<double*>(workspace)};
  if (any_double(*in)) {
    run_step<double>(*in, out, where);
  } else {
    run_step<float>(*in, out, where);
  }
  advflow_finish_means<1>(out.sums, in->batch, in->elements, static_cast<double*>(deviation_sq));
  return ADVFLOW_OK;
}

int64_t advflow_transition_deviation_sq_workspace_cpu(int64_t batch, int64_t elements) {
  return advflow_sde_step_workspace_cpu(batch, elements);
}

int advflow_transition_deviation_sq_cpu(const AdvflowTransitionInputs* in, void* workspace, void* deviation_sq,
                                        void* where) {
  double* sums = static_cast<double*>(workspace);
  explain(*in, nullptr, sums, where);
  advflow_finish_means<1>(sums, in->batch, in->elements, static_cast<double*>(deviation_sq));
  return ADVFLOW_OK;
}

int advflow_transition_deviation_cpu(const AdvflowTransitionInputs* in, void* out, void* where) {
  explain(*in, out, nullptr, where);
  return ADVFLOW_OK;
}
