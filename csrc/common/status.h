// What a launcher returns. Zero is success; a CUDA launcher that fails returns
// the negative of its cudaError_t, so both can travel in one int.
#pragma once

enum AdvflowStatus : int {
  ADVFLOW_OK = 0,
  ADVFLOW_UNSUPPORTED_DTYPE = 1,
};
