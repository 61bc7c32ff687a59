// How CPU kernels borrow the caller's threads.
#pragma once

#include <stdint.h>

// Runs body(context, begin, end) over a partition of [0, count).
struct AdvflowParallelFor {
  void (*run)(int64_t count, void (*body)(void* context, int64_t begin, int64_t end), void* context);
};
