// SPDX-License-Identifier: Apache-2.0
// CUDA for the host compiler: this file stands in for the toolkit's <cuda_runtime.h> when tests/simt builds the .cu
// sources. Only what the project uses, with CUDA's names and error codes.
#pragma once

#include <tuple>
#include <type_traits>
#include <utility>

#include "simt/device.h"
#include "simt/intrinsics.h"

#ifndef LLMKERN_SIMT
#error "tests/simt: define LLMKERN_SIMT as the architecture to emulate, 800 or 900"
#endif

// ---- the language ----

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
// Every block that is alive has an operating-system thread of its own, so this is one variable a block.
#define __shared__ static thread_local

// Constant as far as one thread can see; the scheduler sets them whenever it changes threads. Compilers do not have
// to read them twice, and -fsanitize=thread passes over them.
extern const uint3 threadIdx __asm__("simt_thread_index");
extern const uint3 blockIdx __asm__("simt_block_index");
extern const uint3 blockDim __asm__("simt_block_dimensions");
extern const uint3 gridDim __asm__("simt_grid_dimensions");
constexpr int warpSize = 32;

// ---- errors, devices, streams ----

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorCooperativeLaunchTooLarge = 720,
};

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrL2CacheSize = 38,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 15,
};

enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal = 0, cudaStreamCaptureModeRelaxed = 2 };
constexpr unsigned cudaHostAllocMapped = 2;
using cudaStream_t = struct CUstream_st*;

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned flags);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);

// ---- launching ----

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2, cudaLaunchAttributeClusterDimension = 4 };

union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
  int cooperative;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace simt {

cudaError_t function_attribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t occupancy(int* blocks, const void* kernel, int threads, size_t shared_bytes);
// Every thread calls thread(parameters), which calls the kernel. Throws std::runtime_error with a checker's finding.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*thread)(const void*),
                   const void* parameters, size_t parameter_bytes);

}  // namespace simt

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int value) {
  return simt::function_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(Parameters...), int threads,
                                                          size_t shared_bytes) {
  return simt::occupancy(blocks, reinterpret_cast<const void*>(kernel), threads, shared_bytes);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using Kernel = void (*)(Parameters...);
  const std::pair<Kernel, std::tuple<Parameters...>> call{kernel, {std::forward<Arguments>(arguments)...}};
  const auto thread = [](const void* parameters) {
    const auto& it = *static_cast<const decltype(call)*>(parameters);
    std::apply(it.first, it.second);
  };
  return simt::launch(*config, reinterpret_cast<const void*>(kernel), thread, &call, sizeof call);
}
