// SPDX-License-Identifier: Apache-2.0
// The extension module, and the operators that belong to no family: threads, streams, memory, facts about the build.
//
// Importing the module registers the operators (each family's STABLE_TORCH_LIBRARY_FRAGMENT); it has no Python content.
#include <Python.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <sstream>
#include <tuple>

#include "kernels/cores.h"
#include "ops/block_cache.h"
#include "ops/cuda.h"
#include "ops/tensors.h"

namespace llmkern::ops {

namespace {

// The first exception of the parts of one call. The stable ABI would lose its type and text.
class Failure {
 public:
  template <class F>
  void catch_from(const F& f) {
    try {
      f();
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::mutex mutex_;
  std::exception_ptr error_;
};

void launch(int64_t n, int64_t grain, Parallel::Body body, const void* context) {
  Failure failure;
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    failure.catch_from([&] {
      const AtWork work;
      body(context, begin, end);
    });
  });
  failure.rethrow();
}

}  // namespace

Parallel torch_parallel() {
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  return Parallel(&launch, threads > 1 ? std::min(threads, usable_cores()) : threads);
}

namespace {

// JSON, read by llmkern.info().
std::string build_info() {
  std::ostringstream json;
  json << "{\"cuda_architectures\": \"" << LLMKERN_CUDA_ARCHITECTURES << "\", \"cuda_version\": \""
       << LLMKERN_CUDA_VERSION << "\", \"torch_target_version\": \"" << ((TORCH_TARGET_VERSION >> 56) & 0xff) << '.'
       << ((TORCH_TARGET_VERSION >> 48) & 0xff) << "\", \"compiler\": \"" << __VERSION__ << "\"}";
  return json.str();
}

std::string cpu_isa() { return cpu::name(cpu::active_isa()); }

std::string cpu_isa_detected() { return cpu::name(cpu::detected_isa()); }

// Between calls alone: one call asks several builds' kernels for sizes, layouts and results, which must be one build's.
void select_cpu_isa(std::string name) {
  const auto select = [](void* wanted) { cpu::select_isa(static_cast<const std::string*>(wanted)->c_str()); };
  if (while_nobody_works(select, &name)) return;
  fail<std::runtime_error>("cpu", "expected no other thread in an operator while the instruction set changes to '",
                           name, "', got one; wait for it");
}

int64_t cores() { return usable_cores(); }

void empty_cache() {
  block_cache().free_idle();
  free_thread_memory();
}

std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> memory_stats() {
  const BlockCache::Stats blocks = block_cache().stats();
  const ThreadMemory of_threads = thread_memory();
  return {blocks.held_bytes, blocks.idle_bytes, blocks.mapped_bytes, of_threads.bytes, of_threads.threads};
}

void raise_deferred_errors(int64_t device_index) {
#ifdef LLMKERN_WITH_CUDA
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device_index));
  raise_deferred_error();
#else
  fail<std::runtime_error>("cuda", "expected a build with CUDA kernels for device ", device_index, ", got one without");
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmkern, m) {
  m.def("build_info() -> str");
  m.def("cpu_isa() -> str");
  m.def("cpu_isa_detected() -> str");
  m.def("select_cpu_isa(str name) -> ()");
  m.def("empty_cache() -> ()");
  m.def("memory_stats() -> (int held_bytes, int idle_bytes, int mapped_bytes, int thread_bytes, int threads)");
  m.def("usable_cores() -> int");
  m.def("raise_deferred_errors(int device_index) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(llmkern, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_isa_detected", TORCH_BOX(&cpu_isa_detected));
  m.impl("select_cpu_isa", TORCH_BOX(&select_cpu_isa));
  m.impl("empty_cache", TORCH_BOX(&empty_cache));
  m.impl("memory_stats", TORCH_BOX(&memory_stats));
  m.impl("usable_cores", TORCH_BOX(&cores));
  m.impl("raise_deferred_errors", TORCH_BOX(&raise_deferred_errors));
}

}  // namespace llmkern::ops

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static struct PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", "Native operators of llmkern.", -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
