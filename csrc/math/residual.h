// The formulas of the forward-process core, one element at a time, shared by
// the CPU loops and the CUDA kernels.
//
// v: policy velocity, u = noise - x0: its target, o: rollout-policy velocity,
// p: reference velocity. Residuals in prediction (x0) space are -t times these.
#pragma once

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
