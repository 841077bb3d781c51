// SPDX-License-Identifier: Apache-2.0
// The host's side of kernels/deferred.h: the memory, one record a device.
#include <array>
#include <mutex>

#include "kernels/cuda/common.cuh"
#include "kernels/deferred.h"

namespace llmkern::cuda {

namespace {

constexpr size_t kMaxDevices = 64;

// Allowed while a stream is being captured: the record has nothing to do with the graph.
DeferredError* allocate() {
  constexpr const char* kOperation = "cuda";
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode), kOperation, "cudaThreadExchangeStreamCaptureMode");
  void* memory = nullptr;
  const cudaError_t status = cudaHostAlloc(&memory, sizeof(DeferredError), cudaHostAllocMapped);
  check(cudaThreadExchangeStreamCaptureMode(&mode), kOperation, "cudaThreadExchangeStreamCaptureMode");
  check(status, kOperation, "cudaHostAlloc of " + std::to_string(sizeof(DeferredError)) + " bytes");
  return new (memory) DeferredError{};
}

}  // namespace

DeferredError* deferred_error() {
  static std::mutex mutex;
  static std::array<DeferredError*, kMaxDevices> of_device = {};  // for the life of the process
  int device = 0;
  check(cudaGetDevice(&device), "cuda", "cudaGetDevice");
  const std::lock_guard lock(mutex);
  DeferredError*& error = of_device.at(static_cast<size_t>(device));
  if (error == nullptr) error = allocate();
  return error;
}

}  // namespace llmkern::cuda
