// SPDX-License-Identifier: Apache-2.0
// The extension module, and what is not an operator of one family: threads, streams, what was built and what is in use.
//
// Importing the module registers the operators (each family's STABLE_TORCH_LIBRARY_FRAGMENT); it has no Python content.
#include <Python.h>

#include <sstream>

#include "ops/tensors.h"

#ifdef LLMKERN_WITH_CUDA
#include <dlfcn.h>
#endif

namespace llmkern::ops {

Parallel torch_parallel() {
  return Parallel(
      [](int64_t n, int64_t grain, Parallel::Body body, const void* context) {
        torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
      },
      static_cast<int>(torch::stable::get_num_threads()));
}

#ifdef LLMKERN_WITH_CUDA
// The function lives in libtorch_cuda, which this library must not need: a CPU build of torch has none. Where a CUDA
// tensor exists, torch has loaded it already, so it is only looked up.
void* current_cuda_stream(const Tensor& tensor) {
  using CurrentStream = int32_t (*)(int32_t device_index, void** stream);
  static const auto current_stream = []() -> CurrentStream {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return nullptr;
    return reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  if (current_stream == nullptr)
    fail<std::runtime_error>("cuda", "expected a CUDA build of torch, got one without libtorch_cuda.so");
  void* stream = nullptr;
  if (current_stream(tensor.get_device_index(), &stream) != 0)
    fail<std::runtime_error>("cuda", "torch gave no current CUDA stream");
  return stream;
}
#endif

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

void select_cpu_isa(std::string name) {
  if (cpu::select_isa(name.c_str())) return;
  fail("cpu", "expected an instruction set among generic, avx2, avx512 and at most '", cpu::name(cpu::detected_isa()),
       "' on this machine, got '", name, "'");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(llmkern, m) {
  m.def("build_info() -> str");
  m.def("cpu_isa() -> str");
  m.def("cpu_isa_detected() -> str");
  m.def("select_cpu_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(llmkern, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_isa_detected", TORCH_BOX(&cpu_isa_detected));
  m.impl("select_cpu_isa", TORCH_BOX(&select_cpu_isa));
}

}  // namespace llmkern::ops

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static struct PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", "Native operators of llmkern.", -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
