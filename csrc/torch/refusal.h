// The kernel of every backend and layout that has none.
#pragma once

#include <ATen/core/boxing/KernelFunction.h>

// Raises, naming the first argument that no kernel reads.
void advflow_refuse(const c10::OperatorHandle& op, torch::jit::Stack* stack);
