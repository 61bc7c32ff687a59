// Standard normal noise from a seed and an element's index alone: in any order,
// any number of threads, any batch, on any device.
//
// Integers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011). Normals: Box-Muller on pairs of them.
//
// The logarithm and the sines are polynomials of their own rather than libm's.
// Their arguments are known here, so they need no range reduction and no special
// case, they vectorize, and every x86 machine computes the same bits. CUDA fuses
// multiply-adds, and so agrees within a few units in the last place.
#pragma once

#include <stdint.h>

#include <cmath>

#include "common/half.h"
#include "common/macros.h"

constexpr int kAdvflowNormals = 4;  // what one counter gives

struct AdvflowPhilox {
  uint32_t word[4];
};

ADVFLOW_HD AdvflowPhilox advflow_philox4x32(AdvflowPhilox counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * counter.word[0];
    const uint64_t b = uint64_t(0xCD9E8D57u) * counter.word[2];
    counter = {{uint32_t(b >> 32) ^ counter.word[1] ^ key0, uint32_t(b), uint32_t(a >> 32) ^ counter.word[3] ^ key1,
                uint32_t(a)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// The random words of elements 4 block ... 4 block + 3 of the sample with this seed.
ADVFLOW_HD AdvflowPhilox advflow_random_words(int64_t seed, int64_t block) {
  const uint64_t key = uint64_t(seed), index = uint64_t(block);
  return advflow_philox4x32({{uint32_t(index), uint32_t(index >> 32), 0, 0}}, uint32_t(key), uint32_t(key >> 32));
}

// Box-Muller, first half: -2 log(u), never negative. The word becomes a uniform
// in [2^-33, 1], never 0, so the radius ends at 6.76. u = 2^e (1 + f) with 1 + f
// between sqrt(1/2) and sqrt(2), and a minimax polynomial of log(1 + f).
ADVFLOW_HD float advflow_squared_radius(uint32_t word) {
  constexpr uint32_t kSqrtHalf = 0x3F3504F3;
  const float u = advflow_fma(float(word), 0x1p-32f, 0x1p-33f);
  const uint32_t bits = advflow_float_to_bits(u) - kSqrtHalf;
  const float e = float(int32_t(bits) >> 23);
  const float f = advflow_float_from_bits((bits & 0x007FFFFF) + kSqrtHalf) - 1.0f;
  float p = 0.08700452803f;
  p = advflow_fma(p, f, -0.1426749146f);
  p = advflow_fma(p, f, 0.1491476427f);
  p = advflow_fma(p, f, -0.1657758404f);
  p = advflow_fma(p, f, 0.1996306406f);
  p = advflow_fma(p, f, -0.2500133706f);
  p = advflow_fma(p, f, 0.3333391073f);
  p = advflow_fma(p, f, -0.5f);
  return -2.0f * advflow_fma(e, 0.693147182f, advflow_fma(f * f, p, f));
}

// Box-Muller, second half: the point at this radius. The word is an angle in
// units of 2^-32 turns, which integers split exactly into quarter turns and at
// most an eighth.
ADVFLOW_HD void advflow_point_on_circle(float radius, uint32_t word, float* normals) {
  const uint32_t quarter = (word + 0x20000000u) >> 30;
  const float turns = float(int32_t(word - (quarter << 30))) * 0x1p-32f;
  const float z = turns * turns;
  float sine = -75.39356289f;
  sine = advflow_fma(sine, z, 81.59235356f);
  sine = advflow_fma(sine, z, -41.34166145f);
  sine = advflow_fma(sine, z, 6.283185287f) * turns;
  float cosine = -83.66598528f;
  cosine = advflow_fma(cosine, z, 64.92323015f);
  cosine = advflow_fma(cosine, z, -19.73916727f);
  cosine = advflow_fma(cosine, z, 1.0f);
  const float x = quarter & 1 ? sine : cosine;
  const float y = quarter & 1 ? cosine : sine;
  normals[0] = radius * ((quarter + 1) & 2 ? -x : x);
  normals[1] = radius * (quarter & 2 ? -y : y);
}

ADVFLOW_HD void advflow_normals(const AdvflowPhilox& random, float* normals) {
  using std::sqrt;
  advflow_point_on_circle(sqrt(advflow_squared_radius(random.word[0])), random.word[1], normals);
  advflow_point_on_circle(sqrt(advflow_squared_radius(random.word[2])), random.word[3], normals + 2);
}
