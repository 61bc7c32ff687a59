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

// The noise that explains a latent as it is stored, after rounding: training
// reads that one, and scoring the unrounded latent is wrong by more than a
// clip range.
template <typename T>
ADVFLOW_HD T advflow_sde_eps(T stored, T mean, T inverse_sigma) {
  return (stored - mean) * inverse_sigma;
}

// Squares are exact in double, and so, but for its last digits, is their sum: what one update changes of their mean is
// smaller than float's rounding of it.
template <typename T>
ADVFLOW_HD double advflow_add_square(T eps, double sum) {
  return advflow_fma(double(eps), double(eps), sum);
}
