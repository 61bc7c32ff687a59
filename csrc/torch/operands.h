// What the glue of every operator shares: checked operands, and the call of a
// launcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <optional>

#include "common/dtype.h"

// Calls that reached a launcher; tests assert how many a training step makes.
extern std::atomic<int64_t> advflow_launches;

// Refuses what no kernel reads; the sentence begins with `name` and `verb`.
AdvflowDtype advflow_dtype_code(at::ScalarType type, const char* name, const char* verb = " has dtype ");

// The tensors of one call: each has the shape and device of `v`, is kept
// contiguous and alive, and widens the accumulate type where it is float64.
class AdvflowOperands {
 public:
  explicit AdvflowOperands(const at::Tensor& v);

  // An absent tensor gives null data.
  AdvflowTensor hold(const std::optional<at::Tensor>& tensor, const char* name);
  void accumulate_in(AdvflowDtype dtype);

  int64_t batch() const { return batch_; }
  int64_t elements() const { return batch_ ? like_.numel() / batch_ : 0; }
  bool empty() const { return like_.numel() == 0; }
  at::TensorOptions accumulate_options() const { return like_.options().dtype(accumulate_); }

  // coef is [batch, 3] in the accumulate type: call after the last hold().
  void check_coef(const at::Tensor& coef) const;
  // upstream is one number or [batch], in the accumulate type.
  void check_upstream(const at::Tensor& upstream) const;
  void check_device(const at::Tensor& tensor, const char* name) const;

 private:
  at::Tensor like_;
  int64_t batch_;
  at::ScalarType accumulate_ = at::kFloat;
  at::Tensor held_[5];
  int count_ = 0;
};

// Turns what a launcher returned into an error where it was not success.
void advflow_check_status(int status, const char* op);

// `where` of the CPU launchers: torch's own threads.
void* advflow_torch_threads();
