// Checks, allocation and the calls of launchers: the only file that sees both
// torch tensors and the kernels of a whole loss.
#include "loss.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "latents.h"
#include "launchers.h"
#include "math/losses.h"
#include "operands.h"
#include "stream.h"

namespace {

using OptionalTensor = std::optional<at::Tensor>;

struct Device {
  int64_t (*workspace)(int64_t, int64_t);
  int (*partials)(const AdvflowResidualInputs*, void*, void*);
  int (*loss)(const AdvflowLossInputs*, const void*, void*, void*, void*, void*, void*);
  void* (*where)(const at::Tensor&);
};

const Device cpu = {advflow_residual_stats_workspace_cpu, advflow_residual_partials_cpu, advflow_loss_cpu,
                    advflow_torch_threads};
#ifdef ADVFLOW_WITH_CUDA
const Device cuda = {advflow_residual_stats_workspace_cuda, advflow_residual_partials_cuda, advflow_loss_cuda,
                     advflow_current_stream};
#endif

AdvflowLossShape shape_of(AdvflowLoss loss) {
  return advflow_with_loss(loss, [&](auto loss_is) {
    using Loss = decltype(loss_is);
    static_assert(Loss::means <= ADVFLOW_SUMMARY_MEANS && Loss::numbers <= ADVFLOW_LOSS_NUMBERS &&
                      sizeof(Loss::choices) == sizeof(AdvflowLossInputs::choices),
                  "what a loss reads and reports has a place");
    const int metrics = advflow_summary_metrics(advflow_report_of<Loss>({}));
    AdvflowLossShape shape = {kAdvflowLossNames[loss], Loss::transitions, Loss::numbers, {}, metrics};
    for (const int count : Loss::choices) {
      if (count) shape.choices.push_back(count);
    }
    return shape;
  });
}

AdvflowLoss loss_named(c10::string_view name, bool transitions) {
  std::string accepted;
  for (int k = 0; k < ADVFLOW_LOSSES; ++k) {
    const AdvflowLossShape& shape = advflow_loss_shapes()[k];
    if (shape.transitions != transitions) continue;
    if (name == shape.name) return AdvflowLoss(k);
    accepted += (accepted.empty() ? "'" : ", '") + shape.name + "'";
  }
  TORCH_CHECK(false, "name is '", name, "'; accepted are ", accepted, ".");
}

// What both families are told.
struct Options {
  const at::Tensor& advantages;
  at::ArrayRef<double> numbers;
  const c10::List<OptionalTensor>& tensors;
  at::IntArrayRef choices;
  c10::string_view reduction;

  // Instead of numbers[k]. The dispatcher resolves a lazy minus of every argument but those in such a list.
  OptionalTensor tensor(size_t k) const {
    const OptionalTensor given = tensors[k];
    return given ? OptionalTensor(given->resolve_neg()) : given;
  }

  void check(const AdvflowLossShape& shape, const AdvflowOperands& operands) const;
};

// One value a sample, in any dtype that floats.
void check_scores(const at::Tensor& tensor, const char* name, const AdvflowOperands& operands) {
  advflow_check_given(tensor, name);
  TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == operands.batch(), name, " has shape ", tensor.sizes(),
              "; accepted is [", operands.batch(), "].");
  advflow_dtype_code(tensor.scalar_type(), name);
  operands.check_device(tensor, name);
}

// The same, or one value for all; that one may lie on the CPU, where it can be read without waiting.
void check_number(const at::Tensor& tensor, const std::string& name, const AdvflowOperands& operands) {
  TORCH_CHECK(tensor.dim() == 0 || (tensor.dim() == 1 && tensor.size(0) == operands.batch()), name, " has shape ",
              tensor.sizes(), "; accepted are [] and [", operands.batch(), "].");
  advflow_dtype_code(tensor.scalar_type(), name.c_str());
  if (tensor.dim() || !tensor.is_cpu()) operands.check_device(tensor, name.c_str());
}

void check_count(size_t given, int64_t accepted, const char* name) {
  TORCH_CHECK(int64_t(given) == accepted, name, " has ", given, " values; accepted are ", accepted, ".");
}

void Options::check(const AdvflowLossShape& shape, const AdvflowOperands& operands) const {
  check_scores(advantages, "advantages", operands);
  check_count(numbers.size(), shape.numbers, "numbers");
  check_count(tensors.size(), shape.numbers, "tensors");
  for (size_t k = 0; k < tensors.size(); ++k) {
    if (const OptionalTensor given = tensor(k)) check_number(*given, "tensors[" + std::to_string(k) + "]", operands);
  }
  check_count(choices.size(), int64_t(shape.choices.size()), "choices");
  for (size_t k = 0; k < choices.size(); ++k) {
    TORCH_CHECK(choices[k] >= 0 && choices[k] < shape.choices[k], "choices[", k, "] is ", choices[k],
                "; accepted are 0 to ", shape.choices[k] - 1, ".");
  }
  advflow_check_reduction(reduction);
}

AdvflowNumber read(const at::Tensor& tensor, at::ScalarType accumulate, bool on_cpu, AdvflowReader& reader) {
  if (tensor.is_cpu() && !on_cpu) return {nullptr, 0, tensor.item<double>(), false};
  const bool wide = tensor.scalar_type() == at::kDouble;
  const bool as_it_is = wide || tensor.scalar_type() == accumulate;
  const AdvflowColumn column = reader.kept_column(as_it_is ? tensor : tensor.to(accumulate));
  return {column.data, column.stride, 0.0, wide};
}

// The mix of the statistics, where the loss has one of them for it.
void set_mix(const AdvflowLossInputs& in, const Options& options, at::ScalarType accumulate, AdvflowReader& reader,
             AdvflowResidualInputs* residual) {
  const int mix = advflow_with_loss(in.loss, [&](auto loss_is) {
    using Loss = decltype(loss_is);
    return Loss::mix < 0 || !in.choices[Loss::mix < 0 ? 0 : Loss::mixed_when] ? -1 : Loss::mix;
  });
  if (mix < 0) return;
  const OptionalTensor given = options.tensor(mix);
  if (!in.numbers[mix].data) {
    residual->mix = in.numbers[mix].number;
  } else {
    residual->mixes = reader.kept_column(given->to(accumulate));
  }
}

struct Call {
  AdvflowLoss loss;
  const AdvflowLatents& latents;
  const Options& options;
  const at::Tensor* t;      // forward process
  const at::Tensor* index;  // reverse process
  const at::Tensor* steps;
};

AdvflowLossOutput run(const Call& call, const Device& device) {
  const AdvflowOperands& operands = call.latents.operands;
  const at::Tensor& v = call.latents.v;
  const Options& options = call.options;
  const AdvflowLossShape& shape = advflow_loss_shapes()[call.loss];
  const at::TensorOptions made = operands.accumulate_options();
  const at::ScalarType accumulate = c10::typeMetaToScalarType(made.dtype());

  const c10::OptionalDeviceGuard guard(v.device());
  AdvflowReader reader;
  AdvflowResidualInputs residual = call.latents.read(reader);
  AdvflowLossInputs in = {};
  in.loss = call.loss;
  in.advantages = read(options.advantages, accumulate, v.is_cpu(), reader);
  if (call.t) in.t = read(*call.t, accumulate, v.is_cpu(), reader);
  if (call.index) {
    in.index = static_cast<const int64_t*>(reader.contiguous(*call.index));
    in.steps = reader.contiguous(*call.steps);
    in.step_rows = call.steps->size(0);
  }
  for (size_t k = 0; k < options.numbers.size(); ++k) {
    const OptionalTensor given = options.tensor(k);
    in.numbers[k] =
        given ? read(*given, accumulate, v.is_cpu(), reader) : AdvflowNumber{nullptr, 0, options.numbers[k], false};
  }
  for (size_t k = 0; k < options.choices.size(); ++k) in.choices[k] = int32_t(options.choices[k]);
  set_mix(in, options, accumulate, reader, &residual);
  in.elements = residual.elements;
  in.dtype = advflow_dtype_code(accumulate, "the accumulate type");
  in.report.batch = residual.batch;
  in.report.divisor = options.reduction == "mean" ? double(std::max<int64_t>(residual.batch, 1)) : 1.0;
  in.report.per_sample = options.reduction == "none";
  in.report.largest_gradient = advflow_largest_gradient(v, accumulate);

  const int64_t batch = residual.batch, partials = device.workspace(batch, residual.elements);
  const int64_t stats = batch * ADVFLOW_RESIDUAL_STATS * int64_t(c10::elementSize(accumulate));
  const at::Tensor workspace = at::empty({partials + stats}, made.dtype(at::kByte));
  const at::Tensor loss = in.report.per_sample ? at::empty({batch}, made) : at::empty({}, made);
  const at::Tensor coef = at::empty({batch, 3}, made);
  const at::Tensor metrics = at::empty({shape.metrics}, made);
  char* const memory = static_cast<char*>(workspace.mutable_data_ptr());
  void* const where = device.where(v);
  advflow_launches += 2;
  advflow_check_status(device.partials(&residual, memory, where), shape.name.c_str());
  advflow_check_status(device.loss(&in, memory, memory + partials, loss.mutable_data_ptr(), coef.mutable_data_ptr(),
                                   metrics.mutable_data_ptr(), where),
                       shape.name.c_str());
  return {loss, coef, metrics};
}

AdvflowLossOutput run_forward(c10::string_view name, const AdvflowLatents& latents, const at::Tensor& t,
                              const Options& options, const Device& device) {
  const AdvflowLoss loss = loss_named(name, /*transitions=*/false);
  advflow_check_given(latents.noise.value_or(at::Tensor()), "noise");
  check_scores(t, "t", latents.operands);
  options.check(advflow_loss_shapes()[loss], latents.operands);
  latents.operands.check_served("forward_loss");
  return run({loss, latents, options, &t, nullptr, nullptr}, device);
}

AdvflowLossOutput run_reverse(c10::string_view name, const AdvflowLatents& latents, const at::Tensor& index,
                              const at::Tensor& steps, const Options& options, const Device& device) {
  const AdvflowLoss loss = loss_named(name, /*transitions=*/true);
  const AdvflowOperands& operands = latents.operands;
  advflow_check_given(index, "index");
  TORCH_CHECK(index.dim() == 1 && index.size(0) == operands.batch(), "index has shape ", index.sizes(),
              "; accepted is [", operands.batch(), "].");
  TORCH_CHECK(index.scalar_type() == at::kLong, "index has dtype ", index.scalar_type(), "; accepted is int64.");
  operands.check_device(index, "index");
  advflow_check_given(steps, "steps");
  TORCH_CHECK(steps.dim() == 2 && steps.size(0) > 0 && steps.size(1) == ADVFLOW_STEP_COLUMNS, "steps has shape ",
              steps.sizes(), "; accepted is [steps + 2, ", int(ADVFLOW_STEP_COLUMNS), "].");
  operands.check_accumulate(steps, "steps");
  options.check(advflow_loss_shapes()[loss], operands);
  operands.check_served("reverse_loss");
  return run({loss, latents, options, nullptr, &index, &steps}, device);
}

}  // namespace

const std::vector<AdvflowLossShape>& advflow_loss_shapes() {
  static const std::vector<AdvflowLossShape> shapes = [] {
    std::vector<AdvflowLossShape> made;
    for (int loss = 0; loss < ADVFLOW_LOSSES; ++loss) made.push_back(shape_of(AdvflowLoss(loss)));
    return made;
  }();
  return shapes;
}

ADVFLOW_FORWARD_LOSS(cpu) {
  return run_forward(name, AdvflowLatents::of_samples(v, x0, noise, v_old, v_ref, "x0"), t,
                     {advantages, numbers, tensors, choices, reduction}, cpu);
}

ADVFLOW_REVERSE_LOSS(cpu) {
  return run_reverse(name, AdvflowLatents::of_transitions(v, eps, v_old, v_ref), index, steps,
                     {advantages, numbers, tensors, choices, reduction}, cpu);
}

#ifdef ADVFLOW_WITH_CUDA
ADVFLOW_FORWARD_LOSS(cuda) {
  return run_forward(name, AdvflowLatents::of_samples(v, x0, noise, v_old, v_ref, "x0"), t,
                     {advantages, numbers, tensors, choices, reduction}, cuda);
}

ADVFLOW_REVERSE_LOSS(cuda) {
  return run_reverse(name, AdvflowLatents::of_transitions(v, eps, v_old, v_ref), index, steps,
                     {advantages, numbers, tensors, choices, reduction}, cuda);
}
#endif
