// What the glue of every operator shares: checked operands, and the call of a
// launcher. An operator first checks all it was given and only then reads it, so
// that a call that is refused has copied, allocated and launched nothing.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/string_view.h>

#include <atomic>
#include <optional>
#include <vector>

#include "common/dtype.h"

// Calls that reached a launcher; tests assert how many a training step makes.
extern std::atomic<int64_t> advflow_launches;

// ---------------------------------------------------------------------------
// Checks. Each sentence begins with the argument's name.

// Refuses what no kernel reads; `verb` stands between name and type.
AdvflowDtype advflow_dtype_code(at::ScalarType type, const char* name, const char* verb = " has dtype ");

// Refuses an argument that has to be there and is None.
void advflow_check_given(const at::Tensor& tensor, const char* name);

// CUDA has no float64 kernels.
void advflow_check_served(at::ScalarType accumulate, at::Device device, const char* op);

void advflow_check_reduction(c10::string_view reduction);

// The largest gradient of v's dtype in units of 2 / sqrt(elements), and no larger than what the accumulate type holds
// before the factor 2 / elements.
double advflow_largest_gradient(const at::Tensor& v, at::ScalarType accumulate);

// The tensors of one call: each has the shape and device of `v`, and widens the
// accumulate type where it is float64.
class AdvflowOperands {
 public:
  explicit AdvflowOperands(const at::Tensor& v);  // checks v too

  void check(const at::Tensor& tensor, const char* name);
  void check_if_given(const std::optional<at::Tensor>& tensor, const char* name);
  void accumulate_in(AdvflowDtype dtype);

  // These know the accumulate type once every tensor has been checked.
  void check_served(const char* op) const;
  void check_coef(const at::Tensor& coef) const;                        // [batch, 3]
  void check_column(const at::Tensor& column, const char* name) const;  // one number or [batch]
  void check_accumulate(const at::Tensor& tensor, const char* name) const;

  void check_device(const at::Tensor& tensor, const char* name) const;

  int64_t batch() const { return batch_; }
  int64_t elements() const { return batch_ ? like_.numel() / batch_ : 0; }
  bool empty() const { return like_.numel() == 0; }
  at::TensorOptions accumulate_options() const { return like_.options().dtype(accumulate_); }

 private:
  const at::Tensor& like_;
  int64_t batch_ = 0;
  at::ScalarType accumulate_ = at::kFloat;
};

// ---------------------------------------------------------------------------
// Reading

// Tensors as launchers take them. What a kernel cannot read as it lies is copied
// and lives as long as this.
class AdvflowReader {
 public:
  // Rows may lie anywhere; a copy is made where a row has gaps.
  AdvflowTensor rows(const at::Tensor& tensor);
  AdvflowTensor rows(const std::optional<at::Tensor>& tensor);  // absent: null data
  AdvflowColumn column(const at::Tensor& tensor);               // [batch], or one number for all rows
  AdvflowColumn kept_column(at::Tensor tensor);                 // the same of a tensor that nobody else may hold
  const void* contiguous(const at::Tensor& tensor);

 private:
  const at::Tensor& keep(at::Tensor tensor);

  std::vector<at::Tensor> copies_;
};

// ---------------------------------------------------------------------------
// Launching

// Turns what a launcher returned into an error where it was not success.
void advflow_check_status(int status, const char* op);

// `where` of the CPU launchers: torch's own threads, whatever the tensor.
void* advflow_torch_threads(const at::Tensor& tensor);
