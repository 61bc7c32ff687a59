// One sampler step on the CPU: the next latent, the noise that explains it as it
// is stored, and the mean square of that noise.
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
  double* sums;  // [batch * chunks], of eps^2
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

template <typename T>
ADVFLOW_INLINE void step_any(const AdvflowSdeStepInputs& in, const Outputs& out, int64_t chunk, int64_t row,
                             int64_t begin, int64_t end) {
  alignas(64) T scratch_v[kAdvflowTile], scratch_x[kAdvflowTile], scratch_noise[kAdvflowTile];
  alignas(64) T mean[kAdvflowTile], next[kAdvflowTile], eps[kAdvflowTile];
  const T* coef = static_cast<const T*>(in.coef) + row * 3;
  const T c_x = coef[0], c_v = coef[1], sigma = coef[2];
  const T inverse_sigma = T(1) / sigma;
  AdvflowLanes<T> sums = {};
  for (int64_t first = begin; first < end; first += kAdvflowTile) {
    const int64_t count = end - first < kAdvflowTile ? end - first : kAdvflowTile;
    const int64_t index = row * in.elements + first;
    const T* v = advflow_read_tile(in.v, row, first, count, scratch_v);
    const T* x = advflow_read_tile(in.x, row, first, count, scratch_x);
    for (int64_t i = 0; i < count; ++i) mean[i] = advflow_sde_mean(x[i], v[i], c_x, c_v);
    if (sigma == T(0)) {
      advflow_write_tile(mean, out.x_next, in.dtype, index, count);
      std::memset(static_cast<char*>(out.eps) + index * advflow_item_size(in.dtype), 0,
                  size_t(count * advflow_item_size(in.dtype)));
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
    for (int64_t i = 0; i < count; ++i) eps[i] = advflow_sde_eps(stored[i], mean[i], inverse_sigma);
    advflow_write_tile(eps, out.eps, in.dtype, index, count);
    for (int64_t i = count; i % kAdvflowLanes != 0; ++i) eps[i] = T(0);
    AdvflowLanes<T> tile = {};
    for (int64_t i = 0; i < count; i += kAdvflowLanes) {
      const auto e = AdvflowLanes<T>::load(eps + i, kAdvflowLanes);
      tile += e * e;
    }
    sums += tile;
  }
  out.sums[chunk] = double(sums.sum());
}

using Kernel = void (*)(const AdvflowSdeStepInputs&, const Outputs&, int64_t chunk, int64_t row, int64_t begin,
                        int64_t end);

#define ADVFLOW_KERNEL_FOR(suffix, T, target)                                                               \
  target void step_##suffix(const AdvflowSdeStepInputs& in, const Outputs& out, int64_t chunk, int64_t row, \
                            int64_t begin, int64_t end) {                                                   \
    step_any<T>(in, out, chunk, row, begin, end);                                                           \
  }

ADVFLOW_KERNEL_FOR(baseline, float, )
ADVFLOW_KERNEL_FOR(double, double, )
#if defined(__x86_64__)
ADVFLOW_KERNEL_FOR(avx2, float, ADVFLOW_AVX2)
ADVFLOW_KERNEL_FOR(avx512, float, ADVFLOW_AVX512)
#endif

Kernel kernel_for(double) { return step_double; }

Kernel kernel_for(float) {
#if defined(__x86_64__)
  if (advflow_has_avx512()) return step_avx512;
  if (advflow_has_avx2()) return step_avx2;
#endif
  return step_baseline;
}

bool is_double(const AdvflowTensor& tensor) { return tensor.data && tensor.dtype == ADVFLOW_FLOAT64; }

bool any_double(const AdvflowSdeStepInputs& in) {
  return is_double(in.v) || is_double(in.x) || is_double(in.noise) || in.dtype == ADVFLOW_FLOAT64;
}

template <typename T>
int run(const AdvflowSdeStepInputs& in, const Outputs& out, T* eps_sq, void* where) {
  const Kernel kernel = kernel_for(T());
  advflow_for_each_chunk(in.batch, in.elements, where, [&](int64_t chunk, int64_t row, int64_t begin, int64_t end) {
    kernel(in, out, chunk, row, begin, end);
  });
  advflow_finish_means<1>(out.sums, in.batch, in.elements, eps_sq);
  return ADVFLOW_OK;
}

}  // namespace

int64_t advflow_sde_step_workspace_cpu(int64_t batch, int64_t elements) {
  return batch * advflow_chunks_of(elements) * int64_t(sizeof(double));
}

int advflow_sde_step_cpu(const AdvflowSdeStepInputs* in, void* workspace, void* x_next, void* eps, void* eps_sq,
                         void* where) {
  const Outputs out = {x_next, eps, static_cast<double*>(workspace)};
  if (any_double(*in)) return run(*in, out, static_cast<double*>(eps_sq), where);
  return run(*in, out, static_cast<float*>(eps_sq), where);
}
