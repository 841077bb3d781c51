// SPDX-License-Identifier: Apache-2.0
// A kernel of the runtime's own tests, with one signature for all of them: CASE(kernel<true>) makes it callable from
// Python as "kernel<true>" with the fields in, out, scratch, counters, N. The launch shape, if it is not one block of
// 64 threads, follows: CASE(kernel, {.grid = 2, .block = 64, .cooperative = true}).
#pragma once

#include "bind.h"
#include "kernels/cuda/common.cuh"

struct Case {
  const float* in;
  float *out, *scratch;
  int* counters;
  int64_t N;
};

template <class Args>
void llmkern::cuda::run(const Args& a, void* stream) {
  const auto [kernel, shape] = Args::launched();
  launch("case", kernel, shape, stream, static_cast<const Case&>(a));
}

#define CASE(kernel, ...)                                                                 \
  namespace {                                                                             \
  struct SIMT_JOIN(Case, __LINE__) : Case {                                               \
    static auto launched() {                                                              \
      constexpr auto pointer = &kernel;                                                   \
      llmkern::cuda::LaunchShape shape{.grid = 1, .block = 64};                           \
      __VA_OPT__(shape = __VA_ARGS__;)                                                    \
      return std::pair{pointer, shape};                                                   \
    }                                                                                     \
  };                                                                                      \
  const bool SIMT_JOIN(added, __LINE__) = simt::bindings::add<SIMT_JOIN(Case, __LINE__)>( \
      #kernel, simt::bindings::field<const float*>("in", offsetof(Case, in)) +            \
                   simt::bindings::field<float*>("out", offsetof(Case, out)) +            \
                   simt::bindings::field<float*>("scratch", offsetof(Case, scratch)) +    \
                   simt::bindings::field<int*>("counters", offsetof(Case, counters)) +    \
                   simt::bindings::field<int64_t>("N", offsetof(Case, N)));               \
  }

using namespace llmkern::cuda;
