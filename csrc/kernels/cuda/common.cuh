// SPDX-License-Identifier: Apache-2.0
// What every CUDA kernel shares: one checked way to launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace llmkern::cuda {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Launches kernel<<<grid, block, shared_bytes, stream>>>(args) and turns a failed launch into an exception that names
// the operation and the launch shape.
template <class Args>
void launch(const char* operation, void (*kernel)(Args), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const Args& args) {
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args);
  const cudaError_t status = cudaGetLastError();
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("llmkern.") + operation + ": launch of grid (" + std::to_string(grid.x) + ", " +
                           std::to_string(grid.y) + ", " + std::to_string(grid.z) + "), block " +
                           std::to_string(block.x) + ", " + std::to_string(shared_bytes) +
                           " bytes of shared memory failed: " + cudaGetErrorString(status));
}

}  // namespace llmkern::cuda
