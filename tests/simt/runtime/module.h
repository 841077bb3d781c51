// SPDX-License-Identifier: Apache-2.0
// What a loaded library of kernels says about itself: where its code is, and its __shared__ variables by name.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace simt {

struct Symbol {
  std::string name;
  uintptr_t offset;  // of a variable: in the library's thread-local block
  size_t bytes;
};

struct Module {
  std::string path;
  uintptr_t base, begin, end;  // load address; the range of its image
  size_t tls_module, tls_bytes;
  std::vector<Symbol> shared, functions;  // by offset

  std::string kernel_name(const void* kernel) const;
  // The thread-local block of the calling OS thread.
  uintptr_t tls_base() const;
  bool contains(uintptr_t address) const { return address - begin < end - begin; }
};

// The library that holds this code; read once.
const Module& module_of(const void* code);

}  // namespace simt
