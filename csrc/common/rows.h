// How the CPU kernels walk a batch of rows.
//
// A row is cut into chunks of fixed length, and (row, chunk) pairs are spread
// over threads, so one large sample is parallel too. A chunk is walked in tiles
// that fit the first-level cache: other dtypes are converted there, and fp32 is
// read in place.
//
// Sums run in kAdvflowLanes independent lanes, first over a tile, then over a
// chunk, then across lanes as a tree, then over chunks in double: the order
// depends on the row's length alone, whatever the threads and whatever the
// vector unit (the files are built with -ffp-contract=off, so wider units round
// alike).
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "common/half.h"
#include "common/parallel.h"

#define ADVFLOW_INLINE inline __attribute__((always_inline))

constexpr int64_t kAdvflowChunk = 4096;
constexpr int64_t kAdvflowTile = 512;
constexpr int kAdvflowLanes = 16;
// Below this many elements waking threads costs more than it saves.
constexpr int64_t kAdvflowSerialElements = 32768;

// ---------------------------------------------------------------------------
// Vector units: a kernel is compiled once for each, so that one wheel is fast
// on new machines and runs on old ones.

#if defined(__x86_64__)
#define ADVFLOW_AVX2 __attribute__((target("avx2")))
#define ADVFLOW_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))

inline bool advflow_has_avx2() { return __builtin_cpu_supports("avx2"); }

inline bool advflow_has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

// ---------------------------------------------------------------------------
// Lanes: numbers that the compiler keeps in vector registers

template <typename T>
struct AdvflowLanes {
  typedef T Vector __attribute__((vector_size(kAdvflowLanes * sizeof(T))));
  Vector x;

  // Missing elements read as zero in every tensor, which adds exactly nothing.
  static ADVFLOW_INLINE AdvflowLanes load(const T* from, int64_t valid) {
    AdvflowLanes lanes = {};
    std::memcpy(&lanes.x, from, size_t(valid) * sizeof(T));
    return lanes;
  }
  ADVFLOW_INLINE AdvflowLanes& operator+=(const AdvflowLanes& b) {
    x += b.x;
    return *this;
  }
  friend ADVFLOW_INLINE AdvflowLanes operator+(const AdvflowLanes& a, const AdvflowLanes& b) { return {a.x + b.x}; }
  friend ADVFLOW_INLINE AdvflowLanes operator-(const AdvflowLanes& a, const AdvflowLanes& b) { return {a.x - b.x}; }
  friend ADVFLOW_INLINE AdvflowLanes operator*(const AdvflowLanes& a, const AdvflowLanes& b) { return {a.x * b.x}; }
  friend ADVFLOW_INLINE AdvflowLanes operator*(const AdvflowLanes& a, T b) { return {a.x * b}; }
  friend ADVFLOW_INLINE AdvflowLanes fabs(const AdvflowLanes& a) { return {a.x < 0 ? -a.x : a.x}; }

  ADVFLOW_INLINE T sum() const {
    T tree[kAdvflowLanes];
    std::memcpy(tree, &x, sizeof(tree));
    for (int width = kAdvflowLanes / 2; width > 0; width /= 2) {
      for (int lane = 0; lane < width; ++lane) tree[lane] += tree[lane + width];
    }
    return tree[0];
  }
};

// ---------------------------------------------------------------------------
// Tiles

inline int64_t advflow_item_size(AdvflowDtype dtype) {
  return dtype == ADVFLOW_FLOAT64 ? 8 : dtype == ADVFLOW_FLOAT32 ? 4 : 2;
}

template <typename T>
constexpr AdvflowDtype advflow_dtype_of() {
  return sizeof(T) == 8 ? ADVFLOW_FLOAT64 : ADVFLOW_FLOAT32;
}

// The tile that begins at element `first` of its row, as T: in place where it is
// T already, converted into `scratch` otherwise.
template <typename T>
ADVFLOW_INLINE const T* advflow_read_tile(const AdvflowTensor& tensor, int64_t row, int64_t first, int64_t count,
                                          T* scratch) {
  const char* data =
      static_cast<const char*>(tensor.data) + (row * tensor.row_stride + first) * advflow_item_size(tensor.dtype);
  if (tensor.dtype == advflow_dtype_of<T>()) return reinterpret_cast<const T*>(data);
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

// Rounds once, to an output: rows without a gap, `index` from the start of the
// batch. A double goes to half precision through float: v in half beside
// a double tensor is a test's case, where the second rounding is below notice.
template <typename T>
ADVFLOW_INLINE void advflow_write_tile(const T* from, void* data, AdvflowDtype dtype, int64_t index, int64_t count) {
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

// ---------------------------------------------------------------------------
// Chunks

inline int64_t advflow_chunks_of(int64_t elements) { return (elements + kAdvflowChunk - 1) / kAdvflowChunk; }

// Calls run(chunk, row, begin, end) for every chunk of every row, in threads;
// chunk counts from the start of the batch, begin and end from that of the row.
template <typename Run>
void advflow_for_each_chunk(int64_t batch, int64_t elements, void* where, const Run& run) {
  struct Context {
    const Run& run;
    int64_t elements;
  };
  const auto body = [](void* context, int64_t first, int64_t last) {
    const auto& [run, elements] = *static_cast<const Context*>(context);
    const int64_t chunks = advflow_chunks_of(elements);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t row = chunk / chunks;
      const int64_t from = (chunk % chunks) * kAdvflowChunk;
      const int64_t to = from + kAdvflowChunk < elements ? from + kAdvflowChunk : elements;
      run(chunk, row, from, to);
    }
  };
  Context context = {run, elements};
  const int64_t count = batch * advflow_chunks_of(elements);
  if (batch * elements <= kAdvflowSerialElements) return body(&context, 0, count);
  static_cast<const AdvflowParallelFor*>(where)->run(count, body, &context);
}

// means[batch][kColumns] from the sums of every chunk, [batch * chunks][kColumns]; 0 of a row without elements.
template <int kColumns, typename T>
void advflow_finish_means(const double* sums, int64_t batch, int64_t elements, T* means) {
  const int64_t chunks = advflow_chunks_of(elements);
  for (int64_t row = 0; row < batch; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      double sum = 0.0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += sums[(row * chunks + chunk) * kColumns + column];
      means[row * kColumns + column] = T(sum / double(elements ? elements : 1));
    }
  }
}
