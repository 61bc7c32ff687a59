// The loss core on the CPU: the statistics of a row, and the gradient.
#include "math/residual.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/rows.h"
#include "launchers.h"

namespace {

template <typename T>
using Lanes = AdvflowLanes<T>;

// ---------------------------------------------------------------------------
// Tiles

// One tile of every tensor that is there.
template <typename T>
struct Tile {
  const T *v, *target, *noise, *old, *ref;
  int64_t count;
};

constexpr int kTensors = 5;

template <typename T>
using Scratch = T[kTensors][kAdvflowTile];

// One loop over the tensors rather than five calls, and before it is asked which of
// them are there: the conversions of every dtype are inlined here, and a copy of
// them for each tensor, or for each choice of tensors, is slow to compile.
template <typename T>
ADVFLOW_INLINE Tile<T> read_tiles(const AdvflowResidualInputs& in, int64_t row, int64_t first, int64_t count,
                                  Scratch<T>& scratch) {
  const AdvflowTensor tensors[kTensors] = {in.v, in.target, in.noise, in.v_old, in.v_ref};
  const T* tiles[kTensors] = {};
  for (int k = 0; k < kTensors; ++k) {
    if (tensors[k].data) tiles[k] = advflow_read_tile(tensors[k], row, first, count, scratch[k]);
  }
  return {tiles[0], tiles[1], tiles[2], tiles[3], tiles[4], count};
}

// ---------------------------------------------------------------------------
// One tile, by which tensors are there

template <AdvflowTarget kTarget, bool kOld, bool kRef, typename T>
ADVFLOW_INLINE void accumulate_lanes(const Tile<T>& tile, int64_t i, int64_t valid, T mix, Lanes<T>* sums) {
  using L = Lanes<T>;
  const L v = L::load(tile.v + i, valid);
  const L target = L::load(tile.target + i, valid);
  const L u = kTarget == ADVFLOW_TARGET_X0 ? L::load(tile.noise + i, valid) - target : target;
  const L old = kOld ? L::load(tile.old + i, valid) : L{};
  const L ref = kRef ? L::load(tile.ref + i, valid) : L{};
  advflow_residual_accumulate<kTarget == ADVFLOW_TARGET_EPS, kOld, kRef>(v, u, old, ref, mix, sums);
}

template <AdvflowTarget kTarget, bool kOld, bool kRef, typename T>
ADVFLOW_INLINE void stats_tile(const Tile<T>& tile, T mix, Lanes<T>* sums) {
  int64_t i = 0;
  for (; i + kAdvflowLanes <= tile.count; i += kAdvflowLanes) {
    accumulate_lanes<kTarget, kOld, kRef>(tile, i, kAdvflowLanes, mix, sums);
  }
  if (i < tile.count) accumulate_lanes<kTarget, kOld, kRef>(tile, i, tile.count - i, mix, sums);
}

template <AdvflowTarget kTarget, bool kOld, bool kRef, typename T>
ADVFLOW_INLINE void grad_tile(const Tile<T>& tile, const T* coef, T scale, T* __restrict__ out) {
  const T a = coef[0], b = coef[1], c = coef[2];
  for (int64_t i = 0; i < tile.count; ++i) {
    const T u = kTarget == ADVFLOW_TARGET_X0 ? tile.noise[i] - tile.target[i] : tile.target[i];
    const T old = kOld ? tile.old[i] : T(0);
    const T ref = kRef ? tile.ref[i] : T(0);
    out[i] =
        scale * advflow_residual_combine<kTarget == ADVFLOW_TARGET_EPS, kOld, kRef>(tile.v[i], u, old, ref, a, b, c);
  }
}

// ---------------------------------------------------------------------------
// One chunk of one row, then which vector unit

#define ADVFLOW_FOR_ANCHORS(function, kTarget, in, ...)        \
  switch ((in.v_old.data ? 2 : 0) | (in.v_ref.data ? 1 : 0)) { \
    case 0:                                                    \
      return function<kTarget, false, false, T>(__VA_ARGS__);  \
    case 1:                                                    \
      return function<kTarget, false, true, T>(__VA_ARGS__);   \
    case 2:                                                    \
      return function<kTarget, true, false, T>(__VA_ARGS__);   \
    default:                                                   \
      return function<kTarget, true, true, T>(__VA_ARGS__);    \
  }

#define ADVFLOW_FOR_PRESENT(function, in, ...)                            \
  switch (in.target_is) {                                                 \
    case ADVFLOW_TARGET_U:                                                \
      ADVFLOW_FOR_ANCHORS(function, ADVFLOW_TARGET_U, in, __VA_ARGS__);   \
    case ADVFLOW_TARGET_X0:                                               \
      ADVFLOW_FOR_ANCHORS(function, ADVFLOW_TARGET_X0, in, __VA_ARGS__);  \
    case ADVFLOW_TARGET_EPS:                                              \
      ADVFLOW_FOR_ANCHORS(function, ADVFLOW_TARGET_EPS, in, __VA_ARGS__); \
  }

template <typename T>
ADVFLOW_INLINE void stats_of(const AdvflowResidualInputs& in, const Tile<T>& tile, T mix, Lanes<T>* sums) {
  ADVFLOW_FOR_PRESENT(stats_tile, in, tile, mix, sums);
}

template <typename T>
ADVFLOW_INLINE void grad_of(const AdvflowResidualInputs& in, const Tile<T>& tile, const T* coef, T scale, T* out) {
  ADVFLOW_FOR_PRESENT(grad_tile, in, tile, coef, scale, out);
}

template <typename T>
ADVFLOW_INLINE void stats_chunk(const AdvflowResidualInputs& in, int64_t row, int64_t begin, int64_t end,
                                double* partial) {
  alignas(64) Scratch<T> scratch;
  Lanes<T> chunk[ADVFLOW_RESIDUAL_STATS] = {};
  const T mix = in.mixes.data ? static_cast<const T*>(in.mixes.data)[row * in.mixes.stride] : T(in.mix);
  for (int64_t first = begin; first < end; first += kAdvflowTile) {
    const int64_t count = end - first < kAdvflowTile ? end - first : kAdvflowTile;
    Lanes<T> sums[ADVFLOW_RESIDUAL_STATS] = {};
    stats_of(in, read_tiles<T>(in, row, first, count, scratch), mix, sums);
    for (int stat = 0; stat < ADVFLOW_RESIDUAL_STATS; ++stat) chunk[stat] += sums[stat];
  }
  for (int stat = 0; stat < ADVFLOW_RESIDUAL_STATS; ++stat) partial[stat] = double(chunk[stat].sum());
}

template <typename T>
ADVFLOW_INLINE void grad_chunk(const AdvflowResidualInputs& all, const T* coef, void* grad, int64_t row, int64_t begin,
                               int64_t end) {
  // A tensor whose coefficient is zero is not even read: it may hold anything.
  AdvflowResidualInputs in = all;
  if (coef[1] == T(0)) in.v_old.data = nullptr;
  if (coef[2] == T(0)) in.v_ref.data = nullptr;
  if (coef[0] == T(0) && !in.v_old.data && !in.v_ref.data) {
    const int64_t size = advflow_item_size(in.v.dtype);
    std::memset(static_cast<char*>(grad) + (row * in.elements + begin) * size, 0, size_t((end - begin) * size));
    return;
  }
  alignas(64) Scratch<T> scratch;
  alignas(64) T rounded_later[kAdvflowTile];
  const T scale = T(2.0 / double(in.elements));
  const bool in_place = in.v.dtype == advflow_dtype_of<T>();
  for (int64_t first = begin; first < end; first += kAdvflowTile) {
    const int64_t count = end - first < kAdvflowTile ? end - first : kAdvflowTile;
    const int64_t index = row * in.elements + first;
    T* out = in_place ? static_cast<T*>(grad) + index : rounded_later;
    grad_of(in, read_tiles<T>(in, row, first, count, scratch), coef, scale, out);
    if (!in_place) advflow_write_tile(out, grad, in.v.dtype, index, count);
  }
}

template <typename T>
struct Kernels {
  void (*stats)(const AdvflowResidualInputs&, int64_t row, int64_t begin, int64_t end, double* partial);
  void (*grad)(const AdvflowResidualInputs&, const T* coef, void* grad, int64_t row, int64_t begin, int64_t end);
};

#define ADVFLOW_KERNELS_FOR(suffix, T, target)                                                                      \
  target void stats_##suffix(const AdvflowResidualInputs& in, int64_t row, int64_t begin, int64_t end,              \
                             double* partial) {                                                                     \
    stats_chunk<T>(in, row, begin, end, partial);                                                                   \
  }                                                                                                                 \
  target void grad_##suffix(const AdvflowResidualInputs& in, const T* coef, void* grad, int64_t row, int64_t begin, \
                            int64_t end) {                                                                          \
    grad_chunk<T>(in, coef, grad, row, begin, end);                                                                 \
  }

ADVFLOW_KERNELS_FOR(baseline, float, )
ADVFLOW_KERNELS_FOR(double, double, )
#if defined(__x86_64__)
ADVFLOW_KERNELS_FOR(avx2, float, ADVFLOW_AVX2)
ADVFLOW_KERNELS_FOR(avx512, float, ADVFLOW_AVX512)
#endif

Kernels<double> kernels(double) { return {stats_double, grad_double}; }

Kernels<float> kernels(float) {
#if defined(__x86_64__)
  if (advflow_has_avx512()) return {stats_avx512, grad_avx512};
  if (advflow_has_avx2()) return {stats_avx2, grad_avx2};
#endif
  return {stats_baseline, grad_baseline};
}

// ---------------------------------------------------------------------------
// Launchers

bool is_double(const AdvflowTensor& tensor) { return tensor.data && tensor.dtype == ADVFLOW_FLOAT64; }

bool any_double(const AdvflowResidualInputs& in) {
  return is_double(in.v) || is_double(in.target) || is_double(in.noise) || is_double(in.v_old) || is_double(in.v_ref);
}

template <typename T>
void run_partials(const AdvflowResidualInputs& in, double* partials, void* where) {
  const Kernels<T> kernel = kernels(T());
  advflow_for_each_chunk(in.batch, in.elements, where, [&](int64_t chunk, int64_t row, int64_t begin, int64_t end) {
    kernel.stats(in, row, begin, end, partials + chunk * ADVFLOW_RESIDUAL_STATS);
  });
}

template <typename T>
int run_grad(const AdvflowResidualInputs& in, const T* coef, const AdvflowColumn& upstream, void* grad, void* where) {
  const Kernels<T> kernel = kernels(T());
  advflow_for_each_chunk(in.batch, in.elements, where, [&](int64_t, int64_t row, int64_t begin, int64_t end) {
    const T weight = advflow_upstream<T>(upstream, row);
    const T* given = coef + row * 3;
    const T scaled[3] = {advflow_scaled(given[0], weight), advflow_scaled(given[1], weight),
                         advflow_scaled(given[2], weight)};
    kernel.grad(in, scaled, grad, row, begin, end);
  });
  return ADVFLOW_OK;
}

}  // namespace

int64_t advflow_residual_stats_workspace_cpu(int64_t batch, int64_t elements) {
  return batch * advflow_chunks_of(elements) * ADVFLOW_RESIDUAL_STATS * int64_t(sizeof(double));
}

int advflow_residual_partials_cpu(const AdvflowResidualInputs* in, void* workspace, void* where) {
  double* partials = static_cast<double*>(workspace);
  if (any_double(*in)) {
    run_partials<double>(*in, partials, where);
  } else {
    run_partials<float>(*in, partials, where);
  }
  return ADVFLOW_OK;
}

int advflow_residual_stats_cpu(const AdvflowResidualInputs* in, void* workspace, void* stats, void* where) {
  const double* partials = static_cast<const double*>(workspace);
  advflow_residual_partials_cpu(in, workspace, where);
  if (any_double(*in)) {
    advflow_finish_means<ADVFLOW_RESIDUAL_STATS>(partials, in->batch, in->elements, static_cast<double*>(stats));
  } else {
    advflow_finish_means<ADVFLOW_RESIDUAL_STATS>(partials, in->batch, in->elements, static_cast<float*>(stats));
  }
  return ADVFLOW_OK;
}

int advflow_residual_grad_cpu(const AdvflowResidualInputs* in, const void* coef, const AdvflowColumn* upstream,
                              void* grad, void* where) {
  if (any_double(*in)) return run_grad(*in, static_cast<const double*>(coef), *upstream, grad, where);
  return run_grad(*in, static_cast<const float*>(coef), *upstream, grad, where);
}
