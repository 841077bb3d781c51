// SPDX-License-Identifier: Apache-2.0
#include "ops/cuda.h"

#ifdef LLMKERN_WITH_CUDA

#include <dlfcn.h>

#include <array>
#include <bit>

#include "kernels/sampling.h"

namespace llmkern::ops {

namespace {

#ifndef LLMKERN_SIMT
// The function lives in libtorch_cuda, which this library must not need: a CPU build of torch has none. Where a CUDA
// tensor exists, torch has loaded it already, so it is only looked up.
void* current_stream(int32_t device_index) {
  using CurrentStream = int32_t (*)(int32_t device_index, void** stream);
  static const auto current_stream = []() -> CurrentStream {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return nullptr;
    return reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  if (current_stream == nullptr) {
    fail<std::runtime_error>("cuda", "expected a CUDA build of torch, got one without libtorch_cuda.so");
  }
  void* stream = nullptr;
  if (current_stream(device_index, &stream) != 0) {
    fail<std::runtime_error>("cuda", "torch gave no current CUDA stream");
  }
  return stream;
}
#endif

constexpr const char* kLater =
    " (found by an earlier call: CUDA kernels run behind Python; llmkern.ops.raise_deferred_errors() after a call "
    "waits "
    "for it)";

[[noreturn]] void raise(const DeferredError& e) {
  switch (static_cast<Mistake>(e.mistake)) {
    case Mistake::kEmbeddingId:
      fail<std::out_of_range>("embedding", "expected ids in [0, ", e.limit, "), got ", e.value, " at position ",
                              e.position, " of the flattened ids", kLater);
    case Mistake::kTarget:
      fail<std::out_of_range>("linear_cross_entropy", "expected targets in [0, ", e.limit, ") or ignore_index, got ",
                              e.value, " at position ", e.position, " of the flattened targets", kLater);
    case Mistake::kSampleSetting:
      fail("sample", "expected ", sample_setting_range(static_cast<int>(e.limit)), ", got ",
           std::bit_cast<double>(e.value), " in row ", e.position, kLater);
    case Mistake::kNone:
      break;
  }
  fail<std::runtime_error>("cuda", "expected a known mistake from a kernel, got number ", e.mistake);
}

template <size_t kArguments>
StableIValue call(const char* name, const char* overload, std::array<StableIValue, kArguments> stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return stack[0];
}

StableIValue owned(const Tensor& tensor) { return torch::stable::detail::from(tensor); }

}  // namespace

void raise_deferred_error() {
  DeferredError* error = cuda::deferred_error();
  if (*static_cast<volatile int32_t*>(&error->complete) == 0) return;
  const DeferredError found = *error;
  *error = DeferredError{};
  raise(found);
}

#ifdef LLMKERN_SIMT
OnCuda::OnCuda(const Tensor&) : stream_(nullptr), error_(cuda::deferred_error()) { raise_deferred_error(); }
#else
OnCuda::OnCuda(const Tensor& tensor)
    : guard_(tensor.get_device_index()),
      stream_(current_stream(tensor.get_device_index())),
      error_(cuda::deferred_error()) {
  raise_deferred_error();
}
#endif

Tensor product(const Tensor& a, const Tensor& b, ScalarType out_dtype) {
#ifdef LLMKERN_SIMT  // the CPU has no product that widens
  const Tensor wide_a = torch::stable::to(a, out_dtype), wide_b = torch::stable::to(b, out_dtype);
  return product(wide_a, wide_b);
#else
  if (out_dtype == a.scalar_type()) return product(a, b);
  return torch::stable::detail::to<Tensor>(
      call<3>("aten::mm", "dtype", {owned(a), owned(b), torch::stable::detail::from(out_dtype)}));
#endif
}

Tensor product(const Tensor& a, const Tensor& b) {
  return torch::stable::detail::to<Tensor>(call<2>("aten::mm", "", {owned(a), owned(b)}));
}

void product_into(const Tensor& a, const Tensor& b, Tensor out) {
  torch::stable::detail::to<Tensor>(call<3>("aten::mm", "out", {owned(a), owned(b), owned(out)}));
}

std::pair<Tensor, Tensor> stable_sort(const Tensor& vector) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack = {owned(vector), from(std::optional<bool>(true)), from(int64_t{0}), from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

}  // namespace llmkern::ops

#endif  // LLMKERN_WITH_CUDA
