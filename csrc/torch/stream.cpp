#include "stream.h"

// The device-generic stream needs no CUDA header, so a CPU-only torch builds
// the whole extension. Before torch offered its handle only c10::cuda had it.
#ifdef ADVFLOW_GENERIC_STREAM
#include <ATen/DeviceAccelerator.h>
#else
#include <c10/cuda/CUDAStream.h>
#endif

void* advflow_current_stream(const at::Tensor& tensor) {
#ifdef ADVFLOW_GENERIC_STREAM
  return at::accelerator::getCurrentStream(tensor.get_device()).native_handle();
#else
  return c10::cuda::getCurrentCUDAStream(tensor.get_device()).stream();
#endif
}
