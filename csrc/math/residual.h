// The formulas of the loss core, one element at a time, shared by the CPU loops
// and the CUDA kernels.
//
// v: policy velocity, o: rollout-policy velocity, p: reference velocity.
// Forward process: u = noise - x0, what v is trained towards; residuals in
// prediction (x0) space are -t times these.
// Reverse process: eps, the standard normal noise of a sampler step as the
// rollout policy explains it, stands in u's place.
#pragma once

#include <cmath>

#include "common/dtype.h"
#include "common/macros.h"

enum AdvflowResidualStat : int {
  ADVFLOW_STAT_VU_SQ = 0,      // mean (v - u)^2
  ADVFLOW_STAT_VO_SQ = 1,      // mean (v - o)^2
  ADVFLOW_STAT_VP_SQ = 2,      // mean (v - p)^2
  ADVFLOW_STAT_OU_SQ = 3,      // mean (o - u)^2
  ADVFLOW_STAT_VU_ABS = 4,     // mean |v - u|
  ADVFLOW_STAT_OU_ABS = 5,     // mean |o - u|
  ADVFLOW_STAT_PLUS_ABS = 6,   // mean |(o - u) + mix (v - o)|
  ADVFLOW_STAT_MINUS_ABS = 7,  // mean |(o - u) - mix (v - o)|
  ADVFLOW_RESIDUAL_STATS = 8,
};

// With eps in u's place two columns mean something else, and those that need u
// stay zero.
enum AdvflowTransitionStat : int {
  ADVFLOW_STAT_EPS_VO = 0,  // mean eps (v - o)
  ADVFLOW_STAT_EPS_SQ = 3,  // mean eps^2
};

// Adds one element to the running sums. Statistics of an absent tensor stay as
// they are, and so do the mixed ones at mix = 0. All residuals are taken
// directly: rebuilding (v-u)^2 from the other terms loses every digit once v is
// near u.
template <bool kEps, bool kHasOld, bool kHasRef, typename T, typename Scalar>
ADVFLOW_HD void advflow_residual_accumulate(T v, T u, T o, T p, Scalar mix, T* sums) {
  using std::fabs;  // and whatever a vector type brings along
  const T vo = v - o;
  if (kEps) {
    sums[ADVFLOW_STAT_EPS_SQ] = advflow_fma(u, u, sums[ADVFLOW_STAT_EPS_SQ]);
    if (kHasOld) sums[ADVFLOW_STAT_EPS_VO] = advflow_fma(u, vo, sums[ADVFLOW_STAT_EPS_VO]);
  } else {
    const T vu = v - u;
    sums[ADVFLOW_STAT_VU_SQ] = advflow_fma(vu, vu, sums[ADVFLOW_STAT_VU_SQ]);
    sums[ADVFLOW_STAT_VU_ABS] += fabs(vu);
    if (kHasOld) {
      const T ou = o - u;
      sums[ADVFLOW_STAT_OU_SQ] = advflow_fma(ou, ou, sums[ADVFLOW_STAT_OU_SQ]);
      sums[ADVFLOW_STAT_OU_ABS] += fabs(ou);
      if (mix != Scalar(0)) {
        sums[ADVFLOW_STAT_PLUS_ABS] += fabs(ou + vo * mix);
        sums[ADVFLOW_STAT_MINUS_ABS] += fabs(ou - vo * mix);
      }
    }
  }
  if (kHasOld) sums[ADVFLOW_STAT_VO_SQ] = advflow_fma(vo, vo, sums[ADVFLOW_STAT_VO_SQ]);
  if (kHasRef) {
    const T vp = v - p;
    sums[ADVFLOW_STAT_VP_SQ] = advflow_fma(vp, vp, sums[ADVFLOW_STAT_VP_SQ]);
  }
}

// One where there is none.
template <typename T>
ADVFLOW_HD T advflow_upstream(const AdvflowColumn& upstream, int64_t row) {
  return upstream.data ? static_cast<const T*>(upstream.data)[row * upstream.stride] : T(1);
}

// A coefficient under its row's upstream gradient. Zero stays zero beside an
// infinite one, so that a dropped sample stays dropped.
template <typename T>
ADVFLOW_HD T advflow_scaled(T coef, T upstream) {
  return coef == T(0) ? T(0) : coef * upstream;
}

// a (v - u) + b (v - o) + c (v - p), or with eps in u's place
// a eps + b (v - o) + c (v - p). A zero coefficient drops its term by
// selection, since 0 * NaN would let a bad tensor through.
template <bool kEps, bool kHasOld, bool kHasRef, typename T>
ADVFLOW_HD T advflow_residual_combine(T v, T u, T o, T p, T a, T b, T c) {
  T grad = a == T(0) ? T(0) : a * (kEps ? u : v - u);
  if (kHasOld) grad = b == T(0) ? grad : advflow_fma(b, v - o, grad);
  if (kHasRef) grad = c == T(0) ? grad : advflow_fma(c, v - p, grad);
  return grad;
}
