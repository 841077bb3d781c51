// SPDX-License-Identifier: Apache-2.0
// The CUDA runtime's host functions, and where a thread finds its place. The device is small, so that grids limited by
// residency are small too.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>

#include "block.h"

namespace {

using simt::current;
using simt::running;

struct Device {
  int multiprocessors = 4, capability = LLMKERN_SIMT / 10;
} device;

constexpr int kMaxThreads = 1024, kThreadsPerMultiprocessor = 2048, kBlocksPerMultiprocessor = 32;
constexpr size_t kSharedEverywhere = 48 << 10, kSharedPerMultiprocessor = 228 << 10, kReservedPerBlock = 1 << 10;
constexpr unsigned kPortableCluster = 8, kLargestCluster = 16;

size_t shared_at_most() { return device.capability >= 90 ? (227 << 10) : (163 << 10); }

struct Allowed {
  size_t shared_bytes = kSharedEverywhere;
  unsigned cluster = kPortableCluster;
};
std::map<const void*, Allowed> allowed;

cudaError_t last_error = cudaSuccess;

cudaError_t fail(cudaError_t error) { return last_error = error; }

void apply(const cudaLaunchAttribute& attribute, simt::Launch& launch) {
  if (attribute.id == cudaLaunchAttributeCooperative) launch.cooperative = attribute.val.cooperative != 0;
  if (attribute.id == cudaLaunchAttributeClusterDimension) launch.cluster = attribute.val.clusterDim.x;
}

cudaError_t check(const simt::Launch& launch, const void* kernel) {
  const unsigned threads = launch.threads_per_block();
  if (launch.blocks() == 0 || threads == 0 || threads > kMaxThreads) return cudaErrorInvalidConfiguration;
  if (launch.grid.y > 65535 || launch.grid.z > 65535 || launch.block.z > 64) return cudaErrorInvalidConfiguration;
  if (launch.shared_bytes > allowed[kernel].shared_bytes) return cudaErrorInvalidValue;
  if (launch.cluster == 0 || launch.cluster > allowed[kernel].cluster) return cudaErrorInvalidConfiguration;
  if (launch.grid.x % launch.cluster != 0) return cudaErrorInvalidConfiguration;
  if (launch.cluster > 1 && device.capability < 90) return cudaErrorInvalidConfiguration;
  int blocks = 0;
  simt::occupancy(&blocks, kernel, static_cast<int>(threads), launch.shared_bytes);
  if (blocks == 0) return cudaErrorLaunchOutOfResources;
  const bool fits = launch.blocks() <= static_cast<unsigned>(blocks * device.multiprocessors);
  return launch.cooperative && !fits ? cudaErrorCooperativeLaunchTooLarge : cudaSuccess;
}

}  // namespace

namespace simt {

void* dynamic_shared_memory() { return reinterpret_cast<void*>(current->block->dynamic->base); }

unsigned cluster_rank() { return current->block->linear % running->cluster; }
unsigned cluster_size() { return running->cluster; }

void* map_shared_rank(const void* pointer, unsigned rank) {
  const Block& mine = *current->block;
  if (rank >= running->cluster) {
    fault("shared memory out of bounds",
          "maps to block " + std::to_string(rank) + " of a cluster of " + std::to_string(running->cluster),
          __builtin_return_address(0));
  }
  const Block* other = nullptr;
  for (const Block* block : running->alive) {
    if (block->linear == mine.cluster * running->cluster + rank) other = block;
  }
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const bool is_static = address - mine.tls < running->module->tls_bytes;
  const uintptr_t from = is_static ? mine.tls : mine.dynamic->base, to = is_static ? other->tls : other->dynamic->base;
  return reinterpret_cast<void*>(address - from + to);
}

cudaError_t function_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  Allowed& limits = allowed[kernel];
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    limits.cluster = value != 0 ? kLargestCluster : kPortableCluster;
  } else {
    if (value < 0 || static_cast<size_t>(value) > shared_at_most()) return fail(cudaErrorInvalidValue);
    limits.shared_bytes = std::max(kSharedEverywhere, static_cast<size_t>(value));
  }
  return cudaSuccess;
}

cudaError_t occupancy(int* blocks, const void*, int threads, size_t shared_bytes) {
  const auto by_shared = static_cast<int>(kSharedPerMultiprocessor / (shared_bytes + kReservedPerBlock));
  *blocks = std::min({kBlocksPerMultiprocessor, kThreadsPerMultiprocessor / threads, by_shared});
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*thread)(const void*),
                   const void* parameters, size_t parameter_bytes) {
  Launch launch;
  launch.grid = config.gridDim;
  launch.block = config.blockDim;
  launch.shared_bytes = config.dynamicSmemBytes;
  for (unsigned i = 0; i < config.numAttrs; ++i) apply(config.attrs[i], launch);
  if (const cudaError_t error = check(launch, kernel); error != cudaSuccess) return fail(error);
  launch.module = &module_of(kernel);
  launch.kernel = launch.module->kernel_name(kernel);
  launch.thread = thread;
  launch.parameters = parameters;
  launch.parameter_bytes = parameter_bytes;
  run(launch);
  return cudaSuccess;
}

}  // namespace simt

extern "C" void simt_configure(int multiprocessors, int capability) { device = {multiprocessors, capability}; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchOutOfResources:
      return "too many resources requested for launch";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetDevice(int* number) {
  *number = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      return *value = kMaxThreads, cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      return *value = device.multiprocessors, cudaSuccess;
    case cudaDevAttrL2CacheSize:
      return *value = 50 << 20, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      return *value = device.capability / 10, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *value = device.capability % 10, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return *value = kSharedPerMultiprocessor, cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      return *value = 1, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = static_cast<int>(shared_at_most()), cudaSuccess;
  }
  return fail(cudaErrorInvalidValue);
}

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  *memory = std::malloc(bytes);
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  static cudaStreamCaptureMode current = cudaStreamCaptureModeGlobal;
  std::swap(current, *mode);
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
