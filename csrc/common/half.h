// fp16 and bf16 as raw bits. Device code uses the toolkit's conversions; the
// host versions give the same bits for every value but the payload of NaN, so
// neither side needs the other's headers.
#pragma once

#include <stdint.h>
#include <string.h>

#include "common/macros.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

ADVFLOW_HD float advflow_float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

ADVFLOW_HD uint32_t advflow_float_to_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

ADVFLOW_HD float advflow_bf16_to_float(uint16_t bits) { return advflow_float_from_bits(uint32_t(bits) << 16); }

ADVFLOW_HD uint16_t advflow_float_to_bf16(float value) {
#if defined(__CUDA_ARCH__)
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  const uint32_t bits = advflow_float_to_bits(value);
  if (value != value) return uint16_t((bits >> 16) | 0x0040);
  return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
#endif
}

ADVFLOW_HD float advflow_fp16_to_float(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(bits));
#else
  // Selections rather than branches, so that CPU loops over this vectorize.
  const uint32_t sign = uint32_t(bits & 0x8000) << 16;
  const uint32_t magnitude = uint32_t(bits & 0x7FFF) << 13;
  const uint32_t subnormal = advflow_float_to_bits(float(int32_t(bits & 0x03FF)) * 0x1p-24f);
  const uint32_t rebiased = magnitude + (magnitude >= 0x0F800000 ? 0x70000000 : 0x38000000);
  return advflow_float_from_bits(sign | (magnitude < 0x00800000 ? subnormal : rebiased));
#endif
}

ADVFLOW_HD uint16_t advflow_float_to_fp16(float value) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = advflow_float_to_bits(value);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return sign | 0x7E00;
  // 65520 is halfway between the largest finite value and the next step.
  if (magnitude >= 0x477FF000) return sign | 0x7C00;
  if (magnitude < 0x38800000) {
    // Subnormal result: adding 0.5 leaves the rounded value in the low bits.
    const float shifted = advflow_float_from_bits(magnitude) + 0.5f;
    return uint16_t(sign | (advflow_float_to_bits(shifted) - 0x3F000000));
  }
  const uint32_t rounded = magnitude - 0x38000000 + 0x0FFF + ((magnitude >> 13) & 1);
  return uint16_t(sign | (rounded >> 13));
#endif
}
