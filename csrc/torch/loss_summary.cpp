// Checks, allocation and the call of a launcher: the only file that sees both
// torch tensors and the kernels of the scalar stage.
#include "loss_summary.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <string>

#include "launchers.h"
#include "math/loss_summary.h"
#include "math/residual.h"
#include "operands.h"
#include "stream.h"

namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Summary = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

struct Device {
  int (*summarise)(const AdvflowLossSummaryInputs*, void*, void*, void*, void*);
  void* (*where)(const at::Tensor&);
};

const Device cpu = {advflow_loss_summary_cpu, advflow_torch_threads};
#ifdef ADVFLOW_WITH_CUDA
const Device cuda = {advflow_loss_summary_cuda, advflow_current_stream};
#endif

void check_stats(const at::Tensor& stats) {
  advflow_check_given(stats, "stats");
  TORCH_CHECK(stats.dim() == 2 && stats.size(1) == ADVFLOW_RESIDUAL_STATS, "stats has shape ", stats.sizes(),
              "; accepted is [B, ", int(ADVFLOW_RESIDUAL_STATS), "].");
  TORCH_CHECK(stats.scalar_type() == at::kFloat || stats.scalar_type() == at::kDouble, "stats has dtype ",
              stats.scalar_type(), "; accepted are float32 and float64.");
}

void check_like(const at::Tensor& tensor, const char* name, at::IntArrayRef shape, at::ScalarType type,
                at::Device device) {
  advflow_check_given(tensor, name);
  TORCH_CHECK(tensor.sizes() == shape, name, " has shape ", tensor.sizes(), "; accepted is ", shape, ".");
  TORCH_CHECK(tensor.scalar_type() == type, name, " has dtype ", tensor.scalar_type(), "; accepted is ", type, ".");
  TORCH_CHECK(tensor.device() == device, name, " is on ", tensor.device(), "; accepted is the device of stats, ",
              device, ".");
}

void check_column(const at::Tensor& tensor, const char* name, const at::Tensor& stats) {
  check_like(tensor, name, {stats.size(0)}, stats.scalar_type(), stats.device());
}

void check_columns(at::TensorList tensors, const char* name, int64_t most, const at::Tensor& stats) {
  TORCH_CHECK(int64_t(tensors.size()) <= most, name, " has ", tensors.size(), " columns; accepted are at most ", most,
              ".");
  for (size_t k = 0; k < tensors.size(); ++k) {
    check_column(tensors[k], (std::string(name) + "[" + std::to_string(k) + "]").c_str(), stats);
  }
}

// What not every loss asks for.
struct Extras {
  const OptionalTensor& log_ratio;
  const OptionalTensor& log_lowest;
  const OptionalTensor& log_highest;
  const OptionalTensor& v;
  bool contrast;
};

bool given(const OptionalTensor& tensor) { return tensor.has_value() && tensor->defined(); }

// One number for all samples, or one a sample.
void check_bound(const OptionalTensor& bound, const char* name, const Extras& extras, const at::Tensor& stats) {
  if (!given(bound)) return;
  TORCH_CHECK(given(extras.log_ratio), name, " is given without log_ratio; accepted is one beside it.");
  if (bound->dim() == 0) {
    check_like(*bound, name, {}, stats.scalar_type(), stats.device());
  } else {
    check_column(*bound, name, stats);
  }
}

void check_extras(const Extras& extras, const at::Tensor& stats) {
  if (given(extras.log_ratio)) check_column(*extras.log_ratio, "log_ratio", stats);
  check_bound(extras.log_lowest, "log_lowest", extras, stats);
  check_bound(extras.log_highest, "log_highest", extras, stats);
  if (!given(extras.v)) return;
  const at::Tensor& v = *extras.v;
  TORCH_CHECK(v.dim() > 0 && v.size(0) == stats.size(0), "v has shape ", v.sizes(), "; accepted is [", stats.size(0),
              ", ...].");
  TORCH_CHECK(v.device() == stats.device(), "v is on ", v.device(), "; accepted is the device of stats, ",
              stats.device(), ".");
  advflow_dtype_code(v.scalar_type(), "v");
}

Summary run(at::TensorList means, at::TensorList required, const at::Tensor& advantages, const at::Tensor& extreme,
            const at::Tensor& stats, const at::Tensor& coef, const at::Tensor& valid, const at::Tensor& flagged,
            int64_t stat_means, bool largest, c10::string_view reduction, const Extras& extras, const Device& device) {
  check_stats(stats);
  const int64_t batch = stats.size(0);
  TORCH_CHECK(!means.empty(), "means is empty; accepted are the losses and what else to report.");
  check_columns(means, "means", ADVFLOW_SUMMARY_MEANS, stats);
  check_columns(required, "required", ADVFLOW_SUMMARY_REQUIRED, stats);
  check_column(advantages, "advantages", stats);
  check_column(extreme, "extreme", stats);
  check_like(coef, "coef", {batch, 3}, stats.scalar_type(), stats.device());
  check_like(valid, "valid", {batch}, at::kBool, stats.device());
  check_like(flagged, "flagged", {batch}, at::kBool, stats.device());
  TORCH_CHECK(stat_means >= 0 && stat_means <= ADVFLOW_SUMMARY_STATS, "stat_means is ", stat_means,
              "; accepted are 0 to ", int(ADVFLOW_SUMMARY_STATS), ".");
  advflow_check_reduction(reduction);
  check_extras(extras, stats);
  advflow_check_served(stats.scalar_type(), stats.device(), "loss_summary");

  const c10::OptionalDeviceGuard guard(stats.device());
  AdvflowReader reader;
  AdvflowLossSummaryInputs in = {};
  for (size_t k = 0; k < means.size(); ++k) in.means[k] = reader.column(means[k]);
  for (size_t k = 0; k < required.size(); ++k) in.required[k] = reader.column(required[k]);
  in.report.mean_count = int32_t(means.size());
  in.required_count = int32_t(required.size());
  in.advantages = reader.column(advantages);
  in.extreme = reader.column(extreme);
  in.stats = reader.contiguous(stats);
  in.coef = reader.contiguous(coef);
  in.valid = static_cast<const uint8_t*>(reader.contiguous(valid));
  in.flagged = static_cast<const uint8_t*>(reader.contiguous(flagged));
  in.report.batch = batch;
  in.report.divisor = reduction == "mean" ? double(std::max<int64_t>(batch, 1)) : 1.0;
  in.report.stat_count = int32_t(stat_means);
  in.report.largest = largest;
  in.report.per_sample = reduction == "none";
  in.dtype = advflow_dtype_code(stats.scalar_type(), "stats");

  if (given(extras.log_ratio)) in.log_ratio = reader.column(*extras.log_ratio);
  if (given(extras.log_lowest)) in.log_lowest = reader.column(*extras.log_lowest);
  if (given(extras.log_highest)) in.log_highest = reader.column(*extras.log_highest);
  if (given(extras.v)) in.report.largest_gradient = advflow_largest_gradient(*extras.v, stats.scalar_type());
  in.report.contrast = extras.contrast;
  in.report.ratio = given(extras.log_ratio);

  const at::Tensor loss = in.report.per_sample ? at::empty({batch}, stats.options()) : at::empty({}, stats.options());
  const at::Tensor masked = at::empty({batch, 3}, stats.options());
  const at::Tensor metrics = at::empty({advflow_summary_metrics(in.report)}, stats.options());
  ++advflow_launches;
  advflow_check_status(device.summarise(&in, loss.mutable_data_ptr(), masked.mutable_data_ptr(),
                                        metrics.mutable_data_ptr(), device.where(stats)),
                       "loss_summary");
  return {loss, masked, metrics};
}

}  // namespace

Summary loss_summary_cpu(at::TensorList means, at::TensorList required, const at::Tensor& advantages,
                         const at::Tensor& extreme, const at::Tensor& stats, const at::Tensor& coef,
                         const at::Tensor& valid, const at::Tensor& flagged, int64_t stat_means, bool largest,
                         c10::string_view reduction, const OptionalTensor& log_ratio, const OptionalTensor& log_lowest,
                         const OptionalTensor& log_highest, const OptionalTensor& v, bool contrast) {
  return run(means, required, advantages, extreme, stats, coef, valid, flagged, stat_means, largest, reduction,
             {log_ratio, log_lowest, log_highest, v, contrast}, cpu);
}

#ifdef ADVFLOW_WITH_CUDA
Summary loss_summary_cuda(at::TensorList means, at::TensorList required, const at::Tensor& advantages,
                          const at::Tensor& extreme, const at::Tensor& stats, const at::Tensor& coef,
                          const at::Tensor& valid, const at::Tensor& flagged, int64_t stat_means, bool largest,
                          c10::string_view reduction, const OptionalTensor& log_ratio, const OptionalTensor& log_lowest,
                          const OptionalTensor& log_highest, const OptionalTensor& v, bool contrast) {
  return run(means, required, advantages, extreme, stats, coef, valid, flagged, stat_means, largest, reduction,
             {log_ratio, log_lowest, log_highest, v, contrast}, cuda);
}
#endif
