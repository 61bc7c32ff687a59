// The loss core on the CPU: the statistics of a row, and the gradient.
//
// A row is cut into chunks of fixed length, and (row, chunk) pairs are spread
// over threads, so one large sample is parallel too. A chunk is walked in tiles
// that fit the first-level cache: other dtypes are converted there, and fp32 is
// read in place.
//
// Sums run in kLanes independent lanes, first over a tile, then over a chunk,
// then across lanes as a tree, then over chunks in double: the order depends on
// the row's length alone, whatever the threads and whatever the vector unit
// (the file is built with -ffp-contract=off, so wider units round alike).
#include "math/residual.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/half.h"
#include "launchers.h"

#define ADVFLOW_INLINE inline __attribute__((always_inline))

namespace {

constexpr int64_t kChunk = 4096;
constexpr int64_t kTile = 512;
constexpr int kLanes = 16;
// Below this many elements waking threads costs more than it saves.
constexpr int64_t kSerialElements = 32768;

// kLanes numbers that the compiler keeps in vector registers.
template <typename T>
struct Lanes {
  typedef T Vector __attribute__((vector_size(kLanes * sizeof(T))));
  Vector x;

  // Missing elements read as zero in every tensor, which adds exactly nothing.
  static ADVFLOW_INLINE Lanes load(const T* from, int64_t valid) {
    Lanes lanes = {};
    std::memcpy(&lanes.x, from, size_t(valid) * sizeof(T));
    return lanes;
  }
  ADVFLOW_INLINE Lanes& operator+=(const Lanes& b) {
    x += b.x;
    return *this;
  }
  friend ADVFLOW_INLINE Lanes operator+(const Lanes& a, const Lanes& b) { return {a.x + b.x}; }
  friend ADVFLOW_INLINE Lanes operator-(const Lanes& a, const Lanes& b) { return {a.x - b.x}; }
  friend ADVFLOW_INLINE Lanes operator*(const Lanes& a, const Lanes& b) { return {a.x * b.x}; }
  friend ADVFLOW_INLINE Lanes operator*(const Lanes& a, T b) { return {a.x * b}; }
  friend ADVFLOW_INLINE Lanes fabs(const Lanes& a) { return {a.x < 0 ? -a.x : a.x}; }

  ADVFLOW_INLINE T sum() const {
    T tree[kLanes];
    std::memcpy(tree, &x, sizeof(tree));
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int lane = 0; lane < width; ++lane) tree[lane] += tree[lane + width];
    }
    return tree[0];
  }
};

// ---------------------------------------------------------------------------
// Tiles

int64_t element_size(AdvflowDtype dtype) { return dtype == ADVFLOW_FLOAT64 ? 8 : dtype == ADVFLOW_FLOAT32 ? 4 : 2; }

template <typename T>
constexpr AdvflowDtype dtype_of() {
  return sizeof(T) == 8 ? ADVFLOW_FLOAT64 : ADVFLOW_FLOAT32;
}

// The tile as T: in place where it is T already, converted into `scratch`
// otherwise.
template <typename T>
ADVFLOW_INLINE const T* read_tile(const AdvflowTensor& tensor, int64_t index, int64_t count, T* scratch) {
  const char* data = static_cast<const char*>(tensor.data) + index * element_size(tensor.dtype);
  if (tensor.dtype == dtype_of<T>()) return reinterpret_cast<const T*>(data);
  if (tensor.dtype == ADVFLOW_FLOAT32) {
    const float* from = reinterpret_cast<const float*>(data);
    for (int64_t i = 0; i < count; ++i) scratch[i] = T(from[i]);
  } else if (tensor.dtype == ADVFLOW_BFLOAT16) {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(data);
    for (int64_t i = 0; i < count; ++i) scratch[i] = T(advflow_bf16_to_float(from[i]));
  } else {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(data);
    for (int64_t i = 0; i < count; ++i) scratch[i] = T(advflow_fp16_to_float(from[i]));
  }
  return scratch;
}

// Rounds once. A double goes to half precision through float: v in half beside
// a double tensor is a test's case, where the second rounding is below notice.
template <typename T>
ADVFLOW_INLINE void write_tile(const T* from, void* data, AdvflowDtype dtype, int64_t index, int64_t count) {
  if (dtype == ADVFLOW_FLOAT64) {
    double* to = static_cast<double*>(data) + index;
    for (int64_t i = 0; i < count; ++i) to[i] = double(from[i]);
  } else if (dtype == ADVFLOW_FLOAT32) {
    float* to = static_cast<float*>(data) + index;
    for (int64_t i = 0; i < count; ++i) to[i] = float(from[i]);
  } else if (dtype == ADVFLOW_BFLOAT16) {
    uint16_t* to = static_cast<uint16_t*>(data) + index;
    for (int64_t i = 0; i < count; ++i) to[i] = advflow_float_to_bf16(float(from[i]));
  } else {
    uint16_t* to = static_cast<uint16_t*>(data) + index;
    for (int64_t i = 0; i < count; ++i) to[i] = advflow_float_to_fp16(float(from[i]));
  }
}

// One tile of every tensor that is there.
template <typename T>
struct Tile {
  const T *v, *target, *noise, *old, *ref;
  int64_t count;
};

constexpr int kTensors = 5;

template <typename T>
using Scratch = T[kTensors][kTile];

// One loop over the tensors rather than five calls: the conversions of every
// dtype are inlined here, and five copies of them are slow to compile.
template <typename T>
ADVFLOW_INLINE Tile<T> read_tiles(const AdvflowResidualInputs& in, int64_t index, int64_t count, Scratch<T>& scratch) {
  const AdvflowTensor tensors[kTensors] = {in.v, in.target, in.noise, in.v_old, in.v_ref};
  const T* tiles[kTensors] = {};
  for (int k = 0; k < kTensors; ++k) {
    if (tensors[k].data) tiles[k] = read_tile(tensors[k], index, count, scratch[k]);
  }
  return {tiles[0], tiles[1], tiles[2], tiles[3], tiles[4], count};
}

// ---------------------------------------------------------------------------
// One chunk of one row

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
ADVFLOW_INLINE void stats_chunk(const AdvflowResidualInputs& in, int64_t begin, int64_t end, double* partial) {
  alignas(64) Scratch<T> scratch;
  Lanes<T> chunk[ADVFLOW_RESIDUAL_STATS] = {};
  const T mix = T(in.mix);
  for (int64_t index = begin; index < end; index += kTile) {
    const int64_t count = end - index < kTile ? end - index : kTile;
    const Tile<T> tile = read_tiles<T>(in, index, count, scratch);
    Lanes<T> sums[ADVFLOW_RESIDUAL_STATS] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) accumulate_lanes<kTarget, kOld, kRef>(tile, i, kLanes, mix, sums);
    if (i < count) accumulate_lanes<kTarget, kOld, kRef>(tile, i, count - i, mix, sums);
    for (int stat = 0; stat < ADVFLOW_RESIDUAL_STATS; ++stat) chunk[stat] += sums[stat];
  }
  for (int stat = 0; stat < ADVFLOW_RESIDUAL_STATS; ++stat) partial[stat] = double(chunk[stat].sum());
}

template <AdvflowTarget kTarget, bool kOld, bool kRef, typename T>
ADVFLOW_INLINE void grad_chunk(const AdvflowResidualInputs& in, const T* coef, void* grad, int64_t begin, int64_t end) {
  alignas(64) Scratch<T> scratch;
  alignas(64) T rounded_later[kTile];
  const T a = coef[0], b = coef[1], c = coef[2];
  const T scale = T(2.0 / double(in.elements));
  for (int64_t index = begin; index < end; index += kTile) {
    const int64_t count = end - index < kTile ? end - index : kTile;
    const Tile<T> tile = read_tiles<T>(in, index, count, scratch);
    const bool in_place = in.v.dtype == dtype_of<T>();
    T* __restrict__ out = in_place ? static_cast<T*>(grad) + index : rounded_later;
    for (int64_t i = 0; i < count; ++i) {
      const T u = kTarget == ADVFLOW_TARGET_X0 ? tile.noise[i] - tile.target[i] : tile.target[i];
      const T old = kOld ? tile.old[i] : T(0);
      const T ref = kRef ? tile.ref[i] : T(0);
      out[i] =
          scale * advflow_residual_combine<kTarget == ADVFLOW_TARGET_EPS, kOld, kRef>(tile.v[i], u, old, ref, a, b, c);
    }
    if (!in_place) write_tile(out, grad, in.v.dtype, index, count);
  }
}

// ---------------------------------------------------------------------------
// Which tensors are there, then which vector unit

#define ADVFLOW_FOR_ANCHORS(function, kTarget, in, ...)           \
  switch ((in.v_old.data ? 2 : 0) | (in.v_ref.data ? 1 : 0)) {    \
    case 0:                                                       \
      return function<kTarget, false, false, T>(in, __VA_ARGS__); \
    case 1:                                                       \
      return function<kTarget, false, true, T>(in, __VA_ARGS__);  \
    case 2:                                                       \
      return function<kTarget, true, false, T>(in, __VA_ARGS__);  \
    default:                                                      \
      return function<kTarget, true, true, T>(in, __VA_ARGS__);   \
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
ADVFLOW_INLINE void stats_any(const AdvflowResidualInputs& in, int64_t begin, int64_t end, double* partial) {
  ADVFLOW_FOR_PRESENT(stats_chunk, in, begin, end, partial);
}

template <typename T>
ADVFLOW_INLINE void grad_any(const AdvflowResidualInputs& all, const T* coef, void* grad, int64_t begin, int64_t end) {
  // A tensor whose coefficient is zero is not even read: it may hold anything.
  AdvflowResidualInputs in = all;
  if (coef[1] == T(0)) in.v_old.data = nullptr;
  if (coef[2] == T(0)) in.v_ref.data = nullptr;
  if (coef[0] == T(0) && !in.v_old.data && !in.v_ref.data) {
    const int64_t size = element_size(in.v.dtype);
    std::memset(static_cast<char*>(grad) + begin * size, 0, size_t((end - begin) * size));
    return;
  }
  ADVFLOW_FOR_PRESENT(grad_chunk, in, coef, grad, begin, end);
}

template <typename T>
struct Kernels {
  void (*stats)(const AdvflowResidualInputs&, int64_t begin, int64_t end, double* partial);
  void (*grad)(const AdvflowResidualInputs&, const T* coef, void* grad, int64_t begin, int64_t end);
};

// The same code once for each vector unit, so that one wheel is fast on new
// machines and runs on old ones.
#define ADVFLOW_KERNELS_FOR(suffix, T, target)                                                                        \
  target void stats_##suffix(const AdvflowResidualInputs& in, int64_t begin, int64_t end, double* partial) {          \
    stats_any<T>(in, begin, end, partial);                                                                            \
  }                                                                                                                   \
  target void grad_##suffix(const AdvflowResidualInputs& in, const T* coef, void* grad, int64_t begin, int64_t end) { \
    grad_any<T>(in, coef, grad, begin, end);                                                                          \
  }

ADVFLOW_KERNELS_FOR(baseline, float, )
ADVFLOW_KERNELS_FOR(double, double, )
#if defined(__x86_64__)
ADVFLOW_KERNELS_FOR(avx2, float, __attribute__((target("avx2"))))
ADVFLOW_KERNELS_FOR(avx512, float,
                    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"))))
#endif

Kernels<double> kernels(double) { return {stats_double, grad_double}; }

Kernels<float> kernels(float) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return {stats_avx512, grad_avx512};
  }
  if (__builtin_cpu_supports("avx2")) return {stats_avx2, grad_avx2};
#endif
  return {stats_baseline, grad_baseline};
}

// ---------------------------------------------------------------------------
// Launchers

bool is_double(const AdvflowTensor& tensor) { return tensor.data && tensor.dtype == ADVFLOW_FLOAT64; }

bool any_double(const AdvflowResidualInputs& in) {
  return is_double(in.v) || is_double(in.target) || is_double(in.noise) || is_double(in.v_old) || is_double(in.v_ref);
}

int64_t chunks_of(int64_t elements) { return (elements + kChunk - 1) / kChunk; }

// Calls job.run(row, chunk, begin, end) for every chunk of every row, in
// threads; begin and end count from the start of the tensor.
template <typename Job>
void for_each_chunk(const AdvflowResidualInputs& in, void* where, Job& job) {
  const auto body = [](void* context, int64_t begin, int64_t end) {
    Job& job = *static_cast<Job*>(context);
    const int64_t elements = job.in.elements;
    const int64_t chunks = chunks_of(elements);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / chunks;
      const int64_t from = (item % chunks) * kChunk;
      const int64_t to = from + kChunk < elements ? from + kChunk : elements;
      job.run(item, row, row * elements + from, row * elements + to);
    }
  };
  const int64_t items = in.batch * chunks_of(in.elements);
  if (in.batch * in.elements <= kSerialElements) return body(&job, 0, items);
  static_cast<const AdvflowParallelFor*>(where)->run(items, body, &job);
}

template <typename T>
struct StatsJob {
  const AdvflowResidualInputs& in;
  double* partials;  // [batch * chunks][ADVFLOW_RESIDUAL_STATS]
  Kernels<T> kernel;

  void run(int64_t item, int64_t, int64_t begin, int64_t end) {
    kernel.stats(in, begin, end, partials + item * ADVFLOW_RESIDUAL_STATS);
  }
};

template <typename T>
struct GradJob {
  const AdvflowResidualInputs& in;
  const T* coef;  // [batch][3]
  void* grad;
  Kernels<T> kernel;

  void run(int64_t, int64_t row, int64_t begin, int64_t end) { kernel.grad(in, coef + row * 3, grad, begin, end); }
};

template <typename T>
int run_stats(const AdvflowResidualInputs& in, double* partials, T* stats, void* where) {
  StatsJob<T> job = {in, partials, kernels(T())};
  for_each_chunk(in, where, job);
  const int64_t chunks = chunks_of(in.elements);
  for (int64_t row = 0; row < in.batch; ++row) {
    for (int stat = 0; stat < ADVFLOW_RESIDUAL_STATS; ++stat) {
      double sum = 0.0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        sum += partials[(row * chunks + chunk) * ADVFLOW_RESIDUAL_STATS + stat];
      }
      stats[row * ADVFLOW_RESIDUAL_STATS + stat] = T(sum / double(in.elements));
    }
  }
  return ADVFLOW_OK;
}

template <typename T>
int run_grad(const AdvflowResidualInputs& in, const T* coef, void* grad, void* where) {
  GradJob<T> job = {in, coef, grad, kernels(T())};
  for_each_chunk(in, where, job);
  return ADVFLOW_OK;
}

}  // namespace

int64_t advflow_residual_stats_workspace_cpu(int64_t batch, int64_t elements) {
  return batch * chunks_of(elements) * ADVFLOW_RESIDUAL_STATS * int64_t(sizeof(double));
}

int advflow_residual_stats_cpu(const AdvflowResidualInputs* in, void* workspace, void* stats, void* where) {
  double* partials = static_cast<double*>(workspace);
  if (any_double(*in)) return run_stats(*in, partials, static_cast<double*>(stats), where);
  return run_stats(*in, partials, static_cast<float*>(stats), where);
}

int advflow_residual_grad_cpu(const AdvflowResidualInputs* in, const void* coef, void* grad, void* where) {
  if (any_double(*in)) return run_grad(*in, static_cast<const double*>(coef), grad, where);
  return run_grad(*in, static_cast<const float*>(coef), grad, where);
}
