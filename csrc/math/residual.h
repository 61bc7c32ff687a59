// The formulas of the forward-process core, one element at a time, shared by
// the CPU loops and the CUDA kernels.
//
// v: policy velocity, u = noise - x0: its target, o: rollout-policy velocity,
// p: reference velocity. Residuals in prediction (x0) space are -t times these.
#pragma once

#include <cmath>

#include "common/macros.h"

enum AdvflowResidualStat : int {
  ADVFLOW_STAT_VU_SQ = 0,   // mean (v - u)^2
  ADVFLOW_STAT_VO_SQ = 1,   // mean (v - o)^2
  ADVFLOW_STAT_VP_SQ = 2,   // mean (v - p)^2
  ADVFLOW_STAT_OU_SQ = 3,   // mean (o - u)^2
  ADVFLOW_STAT_VU_ABS = 4,  // mean |v - u|
  ADVFLOW_STAT_OU_ABS = 5,  // mean |o - u|
  ADVFLOW_RESIDUAL_STATS = 6,
};

// Adds one element to the running sums; sums[stat * stride] lets a CPU loop
// keep vector lanes side by side. Statistics of an absent tensor stay as they
// are. All residuals are taken directly: rebuilding (v-u)^2 from the other
// terms loses every digit once v is near u.
template <bool kHasOld, bool kHasRef, typename T>
ADVFLOW_HD void advflow_residual_accumulate(T v, T u, T o, T p, T* sums, int stride = 1) {
  using std::fabs;  // and whatever a vector type brings along
  const T vu = v - u;
  sums[ADVFLOW_STAT_VU_SQ * stride] = advflow_fma(vu, vu, sums[ADVFLOW_STAT_VU_SQ * stride]);
  sums[ADVFLOW_STAT_VU_ABS * stride] += fabs(vu);
  if (kHasOld) {
    const T vo = v - o;
    const T ou = o - u;
    sums[ADVFLOW_STAT_VO_SQ * stride] = advflow_fma(vo, vo, sums[ADVFLOW_STAT_VO_SQ * stride]);
    sums[ADVFLOW_STAT_OU_SQ * stride] = advflow_fma(ou, ou, sums[ADVFLOW_STAT_OU_SQ * stride]);
    sums[ADVFLOW_STAT_OU_ABS * stride] += fabs(ou);
  }
  if (kHasRef) {
    const T vp = v - p;
    sums[ADVFLOW_STAT_VP_SQ * stride] = advflow_fma(vp, vp, sums[ADVFLOW_STAT_VP_SQ * stride]);
  }
}

// a (v - u) + b (v - o) + c (v - p). A zero coefficient drops its term by
// selection, since 0 * NaN would let a bad tensor through.
template <bool kHasOld, bool kHasRef, typename T>
ADVFLOW_HD T advflow_residual_combine(T v, T u, T o, T p, T a, T b, T c) {
  T grad = a == T(0) ? T(0) : a * (v - u);
  if (kHasOld) grad = b == T(0) ? grad : advflow_fma(b, v - o, grad);
  if (kHasRef) grad = c == T(0) ? grad : advflow_fma(c, v - p, grad);
  return grad;
}
