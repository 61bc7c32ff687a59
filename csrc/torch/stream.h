// The one place that knows how to ask torch for the current CUDA stream.
#pragma once

#include <ATen/core/Tensor.h>

// A cudaStream_t of the tensor's device, as launchers take it.
void* advflow_current_stream(const at::Tensor& tensor);
