// SPDX-License-Identifier: Apache-2.0
// What every CUDA kernel shares: one checked way to launch, and the sums and scans over a warp or a block.
//
// A .cu source has two compilers: nvcc, and the host's compiler with tests/simt/include first in its path, which runs
// kernels thread by thread on machines without a GPU (tests/simt/README.md). So a source
//   - launches through launch() alone (no <<<>>>),
//   - takes dynamic shared memory from shared_memory<T>(),
//   - says `#if LLMKERN_ARCH >= 900` where it means the architecture,
//   - leaves PTX to the wrappers of async.cuh and matrix.cuh.
// Everything else is plain CUDA; grids and clusters synchronise through <cooperative_groups.h>.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

// The architecture device code is compiled for, 0 in nvcc's pass over the host code.
#if defined(LLMKERN_SIMT)
#define LLMKERN_ARCH LLMKERN_SIMT
#elif defined(__CUDA_ARCH__)
#define LLMKERN_ARCH __CUDA_ARCH__
#else
#define LLMKERN_ARCH 0
#endif

namespace llmkern::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- launching ------------------------------------------------------------------------------------------------------

// A grid of `wanted` blocks but no more than `most`: kernels stride over their work, so that its size has no limit.
constexpr unsigned grid_size(int64_t wanted, int64_t most = 1 << 16) {
  return static_cast<unsigned>(wanted < most ? wanted : most);
}

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;   // dynamic shared memory of a block
  bool cooperative = false;  // all blocks resident at once: this_grid().sync() is allowed
  unsigned cluster = 1;      // blocks of a cluster, along x; above 1 needs compute capability 9.0
};

inline void check(cudaError_t status, const char* operation, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // ours now: the next caller must not find it
  throw std::runtime_error(std::string("llmkern.") + operation + ": " + what +
                           " failed: " + cudaGetErrorString(status));
}

inline std::string text(const LaunchShape& shape) {
  const auto sizes = [](dim3 d) {
    return std::string("(") + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  };
  return std::string("launch of grid ") + sizes(shape.grid) + ", block " + sizes(shape.block) + ", " +
         std::to_string(shape.shared_bytes) + " bytes of dynamic shared memory" +
         (shape.cluster > 1 ? ", clusters of " + std::to_string(shape.cluster) : "") +
         (shape.cooperative ? ", cooperative" : "");
}

// Whether this is the most dynamic shared memory that this kernel has been launched with on the current device. Asking
// the driver takes a microsecond, and a recurrence launches the same kernel step after step.
inline bool is_new_maximum(const void* kernel, size_t shared_bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, size_t> largest;
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return true;  // the caller's own call will fail and be reported
  const std::lock_guard lock(mutex);
  size_t& known = largest[{device, kernel}];
  if (shared_bytes <= known) return false;
  known = shared_bytes;
  return true;
}

// More than the 48 KiB (or the 8 blocks a cluster) every device has must be asked for, kernel by kernel.
template <class... Parameters>
cudaError_t allow(void (*kernel)(Parameters...), const LaunchShape& shape) {
  constexpr size_t kEverywhere = 48 << 10;
  constexpr unsigned kPortableCluster = 8;
  cudaError_t status = cudaSuccess;
  if (shape.shared_bytes > kEverywhere && is_new_maximum(reinterpret_cast<const void*>(kernel), shape.shared_bytes)) {
    status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
  }
  if (status == cudaSuccess && shape.cluster > kPortableCluster) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  return status;
}

// launch("embedding", kernel<T>, {.grid = blocks, .block = kThreads}, stream, arguments...)
//
// A launch that fails throws std::runtime_error with the operation and the launch shape.
template <class... Parameters>
void launch(const char* operation, void (*kernel)(Parameters...), const LaunchShape& shape, void* stream,
            const std::type_identity_t<Parameters>&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (shape.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = shape.cluster;
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = 1;
  }
  cudaError_t status = allow(kernel, shape);
  if (status == cudaSuccess) status = cudaLaunchKernelEx(&config, kernel, arguments...);
  check(status, operation, text(shape));
}

inline int device_attribute(const char* operation, cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), operation, "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), operation, "cudaDeviceGetAttribute");
  return value;
}

// ---- on the device --------------------------------------------------------------------------------------------------

// The block's dynamic shared memory, aligned to 128 bytes. One array: a kernel that needs several divides it.
template <class T>
__device__ T* shared_memory() {
#ifdef LLMKERN_SIMT
  return static_cast<T*>(simt::dynamic_shared_memory());
#else
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
#endif
}

// N neighbours that are loaded or stored by one instruction (at most 16 bytes; the address must be so aligned).
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  static_assert(sizeof(T) * N <= 16);
  T x[N];
};

// Whether a P may be loaded from there.
template <class P>
__device__ bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % alignof(P) == 0;
}

// CUDA's functions by one name for both types.
__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }  // rounded once
__device__ inline double multiply_add(double a, double b, double c) { return fma(a, b, c); }

// Blocks here are one-dimensional and whole warps.
__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }

struct Plus {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Maximum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

// The reduction over the warp, in every lane, with the same bits in each (operation commutes: a butterfly).
template <class T, class Operation>
__device__ T warp_reduce(T value, Operation operation) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = operation(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// Lane l gets the reduction of lanes 0..l (Hillis & Steele 1986).
template <class T, class Operation>
__device__ T warp_scan(T value, Operation operation) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const T before = __shfl_up_sync(kAllLanes, value, distance);
    if (lane_index() >= distance) value = operation(before, value);
  }
  return value;
}

// One value of every warp, that of the given lane, for all threads of the block to read.
template <int kThreads, class T>
__device__ const T* values_of_warps(T value, int lane) {
  static_assert(kThreads % kWarp == 0);
  __shared__ T of_warp[kThreads / kWarp];
  __syncthreads();  // an earlier call's values may still be read
  if (lane_index() == lane) of_warp[warp_index()] = value;
  __syncthreads();
  return of_warp;
}

// The reduction over the block, in every thread, always in the same order. Every thread of the block must call it.
template <int kThreads, class T, class Operation>
__device__ T block_reduce(T value, Operation operation) {
  value = warp_reduce(value, operation);
  if constexpr (kThreads == kWarp) return value;
  const T* of_warp = values_of_warps<kThreads>(value, 0);
  value = of_warp[0];
  for (int warp = 1; warp < kThreads / kWarp; ++warp) value = operation(value, of_warp[warp]);
  return value;
}

// Thread t gets the reduction of threads 0..t. Every thread of the block must call it.
template <int kThreads, class T, class Operation>
__device__ T block_scan(T value, Operation operation) {
  value = warp_scan(value, operation);
  if constexpr (kThreads == kWarp) return value;
  const T* of_warp = values_of_warps<kThreads>(value, kWarp - 1);
  if (warp_index() == 0) return value;
  T before = of_warp[0];
  for (int warp = 1; warp < warp_index(); ++warp) before = operation(before, of_warp[warp]);
  return operation(before, value);
}

}  // namespace llmkern::cuda
