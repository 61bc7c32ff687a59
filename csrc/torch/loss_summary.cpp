// Checks, allocation and the call of a launcher: the only file that sees both
// torch tensors and the kernels of the scalar stage.
#include "loss_summary.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "launchers.h"
#include "math/residual.h"
#include "operands.h"
#include "stream.h"

namespace {

using Summary = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using Launcher = int (*)(const AdvflowLossSummaryInputs*, void*, void*, void*, void*);

void check_like(const at::Tensor& tensor, const char* name, at::IntArrayRef shape, at::ScalarType type,
                at::Device device) {
  TORCH_CHECK(tensor.sizes() == shape, name, " has shape ", tensor.sizes(), "; accepted is ", shape, ".");
  TORCH_CHECK(tensor.scalar_type() == type, name, " has dtype ", tensor.scalar_type(), "; accepted is ", type, ".");
  TORCH_CHECK(tensor.device() == device, name, " is on ", tensor.device(), "; accepted is ", device, ".");
}

AdvflowColumn column(const at::Tensor& tensor, const char* name, const at::Tensor& stats) {
  check_like(tensor, name, {stats.size(0)}, stats.scalar_type(), stats.device());
  return {tensor.const_data_ptr(), tensor.stride(0)};
}

int32_t columns(at::TensorList tensors, const char* name, int64_t most, const at::Tensor& stats, AdvflowColumn* out) {
  TORCH_CHECK(int64_t(tensors.size()) <= most, name, " has ", tensors.size(), " columns; accepted are at most ", most,
              ".");
  for (const at::Tensor& tensor : tensors) *out++ = column(tensor, name, stats);
  return int32_t(tensors.size());
}

Summary run(at::TensorList means, at::TensorList required, const at::Tensor& advantages, const at::Tensor& extreme,
            const at::Tensor& stats, const at::Tensor& coef, const at::Tensor& valid, const at::Tensor& flagged,
            int64_t stat_means, bool largest, c10::string_view reduction, Launcher launch, void* where) {
  TORCH_CHECK(stats.dim() == 2 && stats.size(1) == ADVFLOW_RESIDUAL_STATS, "stats has shape ", stats.sizes(),
              "; accepted is [B, ", int(ADVFLOW_RESIDUAL_STATS), "].");
  TORCH_CHECK(!means.empty(), "means is empty; accepted are the losses and what else to report.");
  TORCH_CHECK(stat_means >= 0 && stat_means <= ADVFLOW_SUMMARY_STATS, "stat_means is ", stat_means,
              "; accepted are 0 to ", int(ADVFLOW_SUMMARY_STATS), ".");
  TORCH_CHECK(reduction == "mean" || reduction == "sum" || reduction == "none", "reduction is '", reduction,
              "'; accepted are 'mean', 'sum' and 'none'.");
  const int64_t batch = stats.size(0);
  check_like(coef, "coef", {batch, 3}, stats.scalar_type(), stats.device());
  check_like(valid, "valid", {batch}, at::kBool, stats.device());
  check_like(flagged, "flagged", {batch}, at::kBool, stats.device());

  const at::Tensor rows[] = {stats.contiguous(), coef.contiguous(), valid.contiguous(), flagged.contiguous()};
  AdvflowLossSummaryInputs in = {};
  in.mean_count = columns(means, "means", ADVFLOW_SUMMARY_MEANS, stats, in.means);
  in.required_count = columns(required, "required", ADVFLOW_SUMMARY_REQUIRED, stats, in.required);
  in.advantages = column(advantages, "advantages", stats);
  in.extreme = column(extreme, "extreme", stats);
  in.stats = rows[0].const_data_ptr();
  in.coef = rows[1].const_data_ptr();
  in.valid = rows[2].const_data_ptr<bool>();
  in.flagged = rows[3].const_data_ptr<bool>();
  in.batch = batch;
  in.divisor = reduction == "mean" ? double(std::max<int64_t>(batch, 1)) : 1.0;
  in.stat_count = int32_t(stat_means);
  in.largest = largest;
  in.per_sample = reduction == "none";
  in.dtype = advflow_dtype_code(stats.scalar_type(), "stats");

  const at::Tensor loss = in.per_sample ? at::empty({batch}, stats.options()) : at::empty({}, stats.options());
  const at::Tensor masked = at::empty({batch, 3}, stats.options());
  const at::Tensor metrics = at::empty({in.mean_count + in.stat_count + 6}, stats.options());
  ++advflow_launches;
  advflow_check_status(
      launch(&in, loss.mutable_data_ptr(), masked.mutable_data_ptr(), metrics.mutable_data_ptr(), where),
      "loss_summary");
  return {loss, masked, metrics};
}

}  // namespace

Summary loss_summary_cpu(at::TensorList means, at::TensorList required, const at::Tensor& advantages,
                         const at::Tensor& extreme, const at::Tensor& stats, const at::Tensor& coef,
                         const at::Tensor& valid, const at::Tensor& flagged, int64_t stat_means, bool largest,
                         c10::string_view reduction) {
  return run(means, required, advantages, extreme, stats, coef, valid, flagged, stat_means, largest, reduction,
             advflow_loss_summary_cpu, nullptr);
}

#ifdef ADVFLOW_WITH_CUDA
Summary loss_summary_cuda(at::TensorList means, at::TensorList required, const at::Tensor& advantages,
                          const at::Tensor& extreme, const at::Tensor& stats, const at::Tensor& coef,
                          const at::Tensor& valid, const at::Tensor& flagged, int64_t stat_means, bool largest,
                          c10::string_view reduction) {
  const c10::DeviceGuard guard(stats.device());
  return run(means, required, advantages, extreme, stats, coef, valid, flagged, stat_means, largest, reduction,
             advflow_loss_summary_cuda, advflow_current_stream(stats));
}
#endif
