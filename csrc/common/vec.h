// Eight consecutive elements at a time, whatever their type: 16-byte accesses
// where alignment allows, element by element elsewhere. Both ways give a thread
// the same eight elements, so the choice never changes a result.
//
// Loading and converting are separate steps on purpose: a kernel first issues
// the loads of all its tensors, then converts, and pays memory latency once.
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/half.h"

constexpr int kAdvflowVec = 8;
// Rows that are read and written 16 bytes at a time are a multiple of this long: of two neighbouring lanes both or none
// have a part of them.
constexpr int kAdvflowPair = 2 * kAdvflowVec;

// bf16 and fp16 fill the first four words, fp32 all eight.
struct AdvflowRaw8 {
  uint32_t word[kAdvflowVec];
};

ADVFLOW_HD int advflow_element_size(AdvflowDtype dtype) { return dtype == ADVFLOW_FLOAT32 ? 4 : 2; }

inline bool advflow_is_aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Every row, not the first alone. An absent tensor counts as aligned, so it does not decide.
inline bool advflow_is_aligned16(const AdvflowTensor& tensor) {
  return advflow_is_aligned16(tensor.data) && tensor.row_stride * advflow_element_size(tensor.dtype) % 16 == 0;
}

// kLastUse marks reads that nothing repeats soon, so that they do not evict
// what the next kernel wants from the cache. Not __ldg: see common/launch.cuh.
template <bool kLastUse, typename Word>
__device__ Word advflow_load(const Word* address) {
  return kLastUse ? __ldcs(address) : *address;
}

// kStreaming marks writes that are the first to leave the cache, for the sake of what else is in it.
template <bool kStreaming, typename Word>
__device__ void advflow_store(Word* address, Word word) {
  if (kStreaming) {
    __stcs(address, word);
  } else {
    *address = word;
  }
}

// Elements `i` to `i` + 7 of a row.
template <bool kVector, bool kLastUse>
__device__ AdvflowRaw8 advflow_load8(const AdvflowTensor& tensor, int64_t row, int64_t i, int valid) {
  const int64_t index = row * tensor.row_stride + i;
  AdvflowRaw8 raw = {};
  if (kVector) {
    const uint4* address = reinterpret_cast<const uint4*>(static_cast<const char*>(tensor.data) +
                                                          index * advflow_element_size(tensor.dtype));
    const uint4 low = advflow_load<kLastUse>(address);
    raw.word[0] = low.x, raw.word[1] = low.y, raw.word[2] = low.z, raw.word[3] = low.w;
    if (tensor.dtype == ADVFLOW_FLOAT32) {
      const uint4 high = advflow_load<kLastUse>(address + 1);
      raw.word[4] = high.x, raw.word[5] = high.y, raw.word[6] = high.z, raw.word[7] = high.w;
    }
  } else if (tensor.dtype == ADVFLOW_FLOAT32) {
    const uint32_t* address = static_cast<const uint32_t*>(tensor.data) + index;
#pragma unroll
    for (int k = 0; k < kAdvflowVec; ++k) {
      if (k < valid) raw.word[k] = advflow_load<kLastUse>(address + k);
    }
  } else {
    const uint16_t* address = static_cast<const uint16_t*>(tensor.data) + index;
#pragma unroll
    for (int k = 0; k < kAdvflowVec; ++k) {
      if (k < valid) raw.word[k / 2] |= uint32_t(advflow_load<kLastUse>(address + k)) << (16 * (k % 2));
    }
  }
  return raw;
}

__device__ inline void advflow_unpack8(const AdvflowRaw8& raw, AdvflowDtype dtype, float* out) {
  if (dtype == ADVFLOW_FLOAT32) {
#pragma unroll
    for (int k = 0; k < kAdvflowVec; ++k) out[k] = advflow_float_from_bits(raw.word[k]);
  } else if (dtype == ADVFLOW_BFLOAT16) {
#pragma unroll
    for (int k = 0; k < kAdvflowVec; ++k) out[k] = advflow_bf16_to_float(uint16_t(raw.word[k / 2] >> (16 * (k % 2))));
  } else {
#pragma unroll
    for (int k = 0; k < kAdvflowVec; ++k) out[k] = advflow_fp16_to_float(uint16_t(raw.word[k / 2] >> (16 * (k % 2))));
  }
}

__device__ inline AdvflowRaw8 advflow_pack8(const float* in, AdvflowDtype dtype) {
  AdvflowRaw8 raw = {};
  if (dtype == ADVFLOW_FLOAT32) {
#pragma unroll
    for (int k = 0; k < kAdvflowVec; ++k) raw.word[k] = advflow_float_to_bits(in[k]);
  } else if (dtype == ADVFLOW_BFLOAT16) {
#pragma unroll
    for (int k = 0; k < kAdvflowVec; ++k) raw.word[k / 2] |= uint32_t(advflow_float_to_bf16(in[k])) << (16 * (k % 2));
  } else {
#pragma unroll
    for (int k = 0; k < kAdvflowVec; ++k) raw.word[k / 2] |= uint32_t(advflow_float_to_fp16(in[k])) << (16 * (k % 2));
  }
  return raw;
}

// Two neighbouring lanes' 32 bytes each, when both store eight fp32 in a row: lane by lane, 16 bytes at a time, every
// access would fill one half of each of its 32-byte sectors. Here both lanes write the even one's, then the odd one's.
template <bool kStreaming>
__device__ void advflow_store_pair(uint4* address, const AdvflowRaw8& raw) {
  const unsigned lane = threadIdx.x % 32;
  const bool odd = lane % 2 != 0;
  uint32_t own[4], others[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    own[k] = odd ? raw.word[k + 4] : raw.word[k];
    others[k] = __shfl_xor_sync(3u << (lane - odd), odd ? raw.word[k] : raw.word[k + 4], 1);
  }
  const uint4 mine = make_uint4(own[0], own[1], own[2], own[3]);
  const uint4 theirs = make_uint4(others[0], others[1], others[2], others[3]);
  uint4* even = odd ? address - 1 : address;  // this lane's half of the even lane's bytes
  advflow_store<kStreaming>(even, odd ? theirs : mine);
  advflow_store<kStreaming>(even + 2, odd ? mine : theirs);
}

template <bool kVector, bool kStreaming = false>
__device__ void advflow_store8(void* data, AdvflowDtype dtype, int64_t index, int valid, const AdvflowRaw8& raw) {
  if (kVector) {
    uint4* address = reinterpret_cast<uint4*>(static_cast<char*>(data) + index * advflow_element_size(dtype));
    if (dtype == ADVFLOW_FLOAT32) return advflow_store_pair<kStreaming>(address, raw);
    advflow_store<kStreaming>(address, make_uint4(raw.word[0], raw.word[1], raw.word[2], raw.word[3]));
  } else if (dtype == ADVFLOW_FLOAT32) {
#pragma unroll
    for (int k = 0; k < kAdvflowVec; ++k) {
      if (k < valid) static_cast<uint32_t*>(data)[index + k] = raw.word[k];
    }
  } else {
#pragma unroll
    for (int k = 0; k < kAdvflowVec; ++k) {
      if (k < valid) static_cast<uint16_t*>(data)[index + k] = uint16_t(raw.word[k / 2] >> (16 * (k % 2)));
    }
  }
}
