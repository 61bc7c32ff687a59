// The bridge between torch glue and kernels: plain pointers and sizes only, so
// that neither side sees the other's headers. For every op the CPU and the
// CUDA launcher have the same signature and the same meaning.
//
// A row of an AdvflowTensor is dense and its rows have a stride, as columns
// have; whatever is a bare pointer is contiguous, outputs too. Elements lie at
// multiples of their own size, nothing more is asked of an address. Offsets are
// 64-bit. `where` says where the work runs: a cudaStream_t for a *_cuda
// launcher, a const AdvflowParallelFor* for a *_cpu one (so that the CPU kernels
// use the caller's thread pool).
#pragma once

#include <stdint.h>

#include "common/dtype.h"
#include "common/parallel.h"
#include "common/status.h"

// C linkage, so that a test can call a launcher through ctypes.
extern "C" {

enum AdvflowTarget : int32_t {
  ADVFLOW_TARGET_U = 0,    // target is u
  ADVFLOW_TARGET_X0 = 1,   // target is x0, and u = noise - x0 is formed in registers
  ADVFLOW_TARGET_EPS = 2,  // target is the noise eps of a sampler step
};

// The tensors of one training batch, each [batch, elements].
struct AdvflowResidualInputs {
  AdvflowTensor v;  // policy velocity
  AdvflowTensor target;
  AdvflowTensor noise;  // present for ADVFLOW_TARGET_X0 alone
  AdvflowTensor v_old;  // rollout-policy velocity, may be absent
  AdvflowTensor v_ref;  // reference velocity, may be absent
  int64_t batch;
  int64_t elements;
  double mix;  // of the mixed statistics; 0: not wanted
  AdvflowTarget target_is;
  AdvflowColumn mixes;  // in the accumulate type: a mix of each row's own; null: `mix` for all
};

// residual_stats: stats[batch, ADVFLOW_RESIDUAL_STATS], see math/residual.h.
// fp32, or fp64 when any input is fp64; 0 where a statistic needs an absent
// tensor. The value of a row depends on that row's data and on `elements`
// alone: not on batch, position, threads, strides, or the alignment of the
// pointers.
int64_t advflow_residual_stats_workspace_cpu(int64_t batch, int64_t elements);  // bytes
int64_t advflow_residual_stats_workspace_cuda(int64_t batch, int64_t elements);
int advflow_residual_stats_cpu(const AdvflowResidualInputs* in, void* workspace, void* stats, void* where);
int advflow_residual_stats_cuda(const AdvflowResidualInputs* in, void* workspace, void* stats, void* where);

// residual_partials: the sums over pieces of every row that residual_stats would divide, into a workspace of its size;
// for loss, which goes on from them.
int advflow_residual_partials_cpu(const AdvflowResidualInputs* in, void* workspace, void* where);
int advflow_residual_partials_cuda(const AdvflowResidualInputs* in, void* workspace, void* where);

// residual_grad: grad[batch, elements] in v's dtype, rounded once,
//   grad = (2 / elements) * (a (v - u) + b (v - v_old) + c (v - v_ref))
// with eps itself in the place of (v - u) for ADVFLOW_TARGET_EPS, and
// coef[batch, 3] = (a, b, c) in the accumulate type (fp32, or fp64 when
// any input is fp64), each multiplied by the row's upstream gradient (1 where
// that is null). A row
// whose three coefficients are all zero is written as exact zeros whatever its
// inputs and its upstream gradient hold. A zero coefficient never reads NaN into
// the result.
int advflow_residual_grad_cpu(const AdvflowResidualInputs* in, const void* coef, const AdvflowColumn* upstream,
                              void* grad, void* where);
int advflow_residual_grad_cuda(const AdvflowResidualInputs* in, const void* coef, const AdvflowColumn* upstream,
                               void* grad, void* where);

enum AdvflowSummaryLimits : int {
  ADVFLOW_SUMMARY_MEANS = 8,
  ADVFLOW_SUMMARY_REQUIRED = 4,
  ADVFLOW_SUMMARY_STATS = 3,
};

// How the samples of a batch become a loss, its coefficients and metrics.
struct AdvflowReport {
  int64_t batch;
  double divisor;           // of the loss and of the coefficients
  double largest_gradient;  // in units of 2 / sqrt(elements): a row that may exceed it is not usable; 0: not looked at
  int32_t mean_count;
  int32_t stat_count;  // so many leading statistics are reported as means too
  bool largest;        // report the largest |extreme| rather than the smallest extreme
  bool per_sample;     // write loss[batch] rather than its sum over divisor
  bool eps_first;      // the first coefficient is that of eps rather than of v - u
  bool contrast;       // report the share of usable samples with v != v_old
  bool ratio;          // report the metrics of a ratio
};

// What a loss knows of every sample once its statistics are there.
struct AdvflowLossSummaryInputs {
  AdvflowColumn means[ADVFLOW_SUMMARY_MEANS];  // reported as means; the first is the loss
  AdvflowColumn required[ADVFLOW_SUMMARY_REQUIRED];
  AdvflowColumn advantages;
  AdvflowColumn extreme;
  const void* stats;       // [batch, ADVFLOW_RESIDUAL_STATS]
  const void* coef;        // [batch, 3]
  const uint8_t* valid;    // [batch], 0 or not
  const uint8_t* flagged;  // [batch], 0 or not
  int32_t required_count;
  AdvflowDtype dtype;                     // the accumulate type of everything here
  AdvflowColumn log_ratio;                // read where the report is of a ratio
  AdvflowColumn log_lowest, log_highest;  // where the ratio is clipped; null: nowhere
  AdvflowReport report;
};

// loss_summary: a sample is usable when it is valid and every number given of
// it is finite, also its gradient before the divisor and the sums that make it, whose elements are at most
//   2 / sqrt(elements) * (|a| rms(v - u) + |b| rms(v - v_old) + |c| rms(v - v_ref));
// of any other the loss and the coefficients become zero.
//   loss[batch] or loss[1], masked_coef[batch, 3] = coef / divisor,
//   metrics: means of `means` and of the leading statistics, mean advantage,
//   mean |advantage|, the extreme, all over usable samples; how many usable ones
//   are flagged, how many samples are not finite, how many not valid. Then, where
//   asked for, the contrast, and of a ratio r, whose logarithm counts up to 80, the
//   mean of (log r)^2 / 2, mean, standard deviation, minimum and maximum of r (those
//   of an empty batch: 0, 1, 0, 1, 1), and the shares above and below the clip.
// CUDA serves fp32. The CPU's few numbers a sample are one thread's work, and
// its `where` is not read.
int advflow_loss_summary_cpu(const AdvflowLossSummaryInputs* in, void* loss, void* masked_coef, void* metrics,
                             void* where);
int advflow_loss_summary_cuda(const AdvflowLossSummaryInputs* in, void* loss, void* masked_coef, void* metrics,
                              void* where);

// A loss whose formula the core has itself; math/losses.h names them.
enum AdvflowLoss : int32_t {
  ADVFLOW_ADVANTAGE_FLOW = 0,
  ADVFLOW_DIFFUSION_NFT = 1,
  ADVFLOW_FLOW_AWR = 2,
  ADVFLOW_REWARD_WEIGHTED = 3,
  ADVFLOW_FLOW_GRPO = 4,
  ADVFLOW_FLOW_DPPO = 5,
  ADVFLOW_LOSSES = 6,
};

enum AdvflowLossLimits : int {
  ADVFLOW_LOSS_NUMBERS = 4,
  ADVFLOW_LOSS_CHOICES = 3,
  ADVFLOW_STEP_COLUMNS = 5,  // c_x, c_v, sigma, kappa, dt
};

// What a loss is told beside its latents.
struct AdvflowLossInputs {
  AdvflowNumber advantages;
  AdvflowNumber t;       // forward process: sample times
  const int64_t* index;  // reverse process: [batch], each transition's step
  const void* steps;  // [step_rows, ADVFLOW_STEP_COLUMNS]; the first row and the last stand for steps before and after
  int64_t step_rows;
  AdvflowNumber
      numbers[ADVFLOW_LOSS_NUMBERS];      // what they are is the loss's; one that is out of range drops its sample
  int32_t choices[ADVFLOW_LOSS_CHOICES];  // and so are these, by their place among the accepted ones
  int64_t elements;
  AdvflowLoss loss;
  AdvflowDtype dtype;    // the accumulate type of everything here
  AdvflowReport report;  // what the loss itself does not say of it
};

// loss: from the partials of residual_partials to loss, masked_coef and metrics, as loss_summary has them, in one
// launch. stats[batch, ADVFLOW_RESIDUAL_STATS] is written on the way. A sample is valid when 0 < t <= 1, a transition
// when its step's sigma is above 0. CUDA serves fp32; the CPU's work is one thread's.
int advflow_loss_cpu(const AdvflowLossInputs* in, const void* partials, void* stats, void* loss, void* masked_coef,
                     void* metrics, void* where);
int advflow_loss_cuda(const AdvflowLossInputs* in, const void* partials, void* stats, void* loss, void* masked_coef,
                      void* metrics, void* where);

// One sampler step of every row, [batch, elements].
struct AdvflowSdeStepInputs {
  AdvflowTensor v;
  AdvflowTensor x;
  AdvflowTensor noise;   // absent: drawn from `seeds`
  const int64_t* seeds;  // [batch], null where noise is given
  const void* coef;      // [batch, 3] = (c_x, c_v, sigma) in the accumulate type
  int64_t batch;
  int64_t elements;
  AdvflowDtype dtype;  // of x_next
};

// sde_step: with mean = c_x x + c_v v, x_next = mean + sigma noise rounded to
// `dtype`; eps = (x_next - mean) / sigma of the rounded x_next, in the
// accumulate type (fp32, or fp64 when an input or `dtype` is fp64);
// deviation_sq[batch] = mean (x_next - mean)^2 in fp64,
// summed in it. Where sigma is 0, x_next is the rounded mean, eps and deviation_sq are 0, and noise is not read. Noise
// from seeds is that of math/philox.h: it depends on the row's seed and the element's index in the row alone.
int64_t advflow_sde_step_workspace_cpu(int64_t batch, int64_t elements);  // bytes
int64_t advflow_sde_step_workspace_cuda(int64_t batch, int64_t elements);
int advflow_sde_step_cpu(const AdvflowSdeStepInputs* in, void* workspace, void* x_next, void* eps, void* deviation_sq,
                         void* where);
int advflow_sde_step_cuda(const AdvflowSdeStepInputs* in, void* workspace, void* x_next, void* eps, void* deviation_sq,
                          void* where);

// A stored transition of every row, [batch, elements].
struct AdvflowTransitionInputs {
  AdvflowTensor v;
  AdvflowTensor x;
  AdvflowTensor x_next;
  const void* coef;      // [batch, 3] = (c_x, c_v, sigma) in the accumulate type
  AdvflowColumn weight;  // of the deviation, in the accumulate type; null: 1 / sigma, which makes it eps
  int64_t batch;
  int64_t elements;
  AdvflowDtype dtype;  // of what is written
};

// The deviation x_next - mean of an x_next that was stored. transition_deviation: weight times it, rounded once to
// `dtype`; exact zeros where sigma or the row's weight is 0, whatever the latents hold. transition_deviation_sq:
// [batch] in fp64; 0 where sigma is 0. eps and deviation_sq are bit for bit those of the step that made x_next.
int64_t advflow_transition_deviation_sq_workspace_cpu(int64_t batch, int64_t elements);  // bytes
int64_t advflow_transition_deviation_sq_workspace_cuda(int64_t batch, int64_t elements);
int advflow_transition_deviation_sq_cpu(const AdvflowTransitionInputs* in, void* workspace, void* deviation_sq,
                                        void* where);
int advflow_transition_deviation_sq_cuda(const AdvflowTransitionInputs* in, void* workspace, void* deviation_sq,
                                         void* where);
int advflow_transition_deviation_cpu(const AdvflowTransitionInputs* in, void* out, void* where);
int advflow_transition_deviation_cuda(const AdvflowTransitionInputs* in, void* out, void* where);

}  // extern "C"
