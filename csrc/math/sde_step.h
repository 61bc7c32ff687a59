// The formulas of one stochastic sampler step, one element at a time, shared by
// the CPU loops and the CUDA kernels.
//
// Every sampler of the reverse process is affine with isotropic noise:
// x' = mean + sigma noise, mean = c_x x + c_v v (Flow-GRPO, arXiv 2505.05470
// eq. 9; DanceGRPO and Flow-CPS differ in the three numbers alone).
#pragma once

#include "common/macros.h"

template <typename T>
ADVFLOW_HD T advflow_sde_mean(T x, T v, T c_x, T c_v) {
  return advflow_fma(c_v, v, c_x * x);
}

template <typename T>
ADVFLOW_HD T advflow_sde_next(T mean, T sigma, T noise) {
  return advflow_fma(sigma, noise, mean);
}

// stored - mean, sigma times the noise that explains a latent as it is stored, after rounding: training reads that
// one, and scoring the unrounded latent is wrong by more than a clip range. In this order what is rounded before v
// joins is the same for every v, and so cancels in the difference of two log-probabilities; the last rounding is one of
// the deviation and not of the mean, which is larger by 1 / sigma.
template <typename T>
ADVFLOW_HD T advflow_sde_deviation(T stored, T x, T v, T c_x, T c_v) {
  return advflow_fma(-c_v, v, advflow_fma(-c_x, x, stored));
}

// Squares are exact in double, and so, but for its last digits, is their sum: what one update changes of their mean is
// smaller than float's rounding of it.
template <typename T>
ADVFLOW_HD double advflow_add_square(T deviation, double sum) {
  return advflow_fma(double(deviation), double(deviation), sum);
}
