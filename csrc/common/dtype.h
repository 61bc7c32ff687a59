// Tensors as they cross the launcher boundary. The dtype values are also
// exported to Python, which checks them against torch dtypes at import.
#pragma once

#include <stdint.h>

enum AdvflowDtype : int32_t {
  ADVFLOW_FLOAT32 = 0,
  ADVFLOW_FLOAT64 = 1,
  ADVFLOW_FLOAT16 = 2,
  ADVFLOW_BFLOAT16 = 3,
};

// [batch, elements]: a row's elements lie side by side, the rows anywhere.
struct AdvflowTensor {
  const void* data;    // null: this input is absent
  int64_t row_stride;  // elements from one row to the next; 0: one row for all
  AdvflowDtype dtype;
};

// One number a row, in the accumulate type, `stride` elements apart.
struct AdvflowColumn {
  const void* data;
  int64_t stride;  // 0: one number for all rows
};

// An option of a loss or what a sample was drawn with: one number for all rows, or one a row.
struct AdvflowNumber {
  const void* data;  // in the accumulate type, or float64 where `wide`; null: `number` is it
  int64_t stride;    // 0: one number for all rows
  double number;
  bool wide;
};
