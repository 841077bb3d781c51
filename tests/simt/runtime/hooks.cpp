// SPDX-License-Identifier: Apache-2.0
// The other end of gcc's -fsanitize=thread,bounds,alignment: the kernels are compiled with them but linked without
// their libraries, so every memory access of a kernel calls a function here.
#include <cstring>
#include <string>

#include "block.h"

using simt::Access;
using simt::touch;

namespace {

// A GPU faults on a misaligned access; x86 does not.
void aligned(const void* address, size_t bytes, Access access, const void* pc) {
  if (simt::current != nullptr && reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    simt::fault("misaligned access", std::to_string(bytes) + " bytes at an address that is no multiple of that", pc);
  }
  touch(address, bytes, access, pc);
}

// A volatile access is how a flag is read and set between blocks.
void flag(void* address, size_t bytes, bool writes, const void* pc) {
  if (simt::current == nullptr) return;
  if (writes) {
    if (simt::current->fenced) simt::release_at(address);
  } else {
    simt::spin();
    simt::acquire_at(address);
  }
  touch(address, bytes, writes ? Access::kAtomic : Access::kAtomicRead, pc);
}

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
struct TypeDescriptor {
  uint16_t kind, info;
  char name[1];
};
struct OutOfBounds {
  SourceLocation location;
  const TypeDescriptor *array, *index;
};
struct Mismatch {
  SourceLocation location;
  const TypeDescriptor* type;
  unsigned char log_alignment, kind;
};

[[noreturn]] void stop(const char* kind, const std::string& detail, const SourceLocation& where, const void* pc) {
  if (simt::current == nullptr) __builtin_trap();  // host code: a debugger shows more
  simt::fault(kind, detail + " (" + where.file + ":" + std::to_string(where.line) + ")", pc);
}

}  // namespace

#define SIMT_PC __builtin_return_address(0)
#define SIMT_HOOKS(bytes)                                                                   \
  void __tsan_read##bytes(void* p) { aligned(p, bytes, Access::kRead, SIMT_PC); }           \
  void __tsan_write##bytes(void* p) { aligned(p, bytes, Access::kWrite, SIMT_PC); }         \
  void __tsan_unaligned_read##bytes(void* p) { touch(p, bytes, Access::kRead, SIMT_PC); }   \
  void __tsan_unaligned_write##bytes(void* p) { touch(p, bytes, Access::kWrite, SIMT_PC); } \
  void __tsan_volatile_read##bytes(void* p) { flag(p, bytes, false, SIMT_PC); }             \
  void __tsan_volatile_write##bytes(void* p) { flag(p, bytes, true, SIMT_PC); }

extern "C" {

SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* p, size_t bytes) { touch(p, bytes, Access::kRead, SIMT_PC); }
void __tsan_write_range(void* p, size_t bytes) { touch(p, bytes, Access::kWrite, SIMT_PC); }
void __tsan_vptr_update(void**, void*) {}
// The guard of a local static, in host code.
char __tsan_atomic8_load(const volatile char* p, int) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }

// Calls of the C library from a kernel, through the linker's --wrap.
void* __wrap_memcpy(void* to, const void* from, size_t bytes) {
  touch(from, bytes, Access::kRead, SIMT_PC);
  touch(to, bytes, Access::kWrite, SIMT_PC);
  return std::memcpy(to, from, bytes);
}
void* __wrap_memmove(void* to, const void* from, size_t bytes) {
  touch(from, bytes, Access::kRead, SIMT_PC);
  touch(to, bytes, Access::kWrite, SIMT_PC);
  return std::memmove(to, from, bytes);
}
void* __wrap_memset(void* to, int value, size_t bytes) {
  touch(to, bytes, Access::kWrite, SIMT_PC);
  return std::memset(to, value, bytes);
}

void __ubsan_handle_out_of_bounds(const OutOfBounds* data, uintptr_t index) {
  stop("array index out of bounds",
       "index " + std::to_string(static_cast<intptr_t>(index)) + " of " + data->array->name, data->location, nullptr);
}

void __ubsan_handle_type_mismatch_v1(const Mismatch* data, uintptr_t address) {
  const size_t alignment = size_t{1} << data->log_alignment;
  stop("misaligned access",
       std::string(data->type->name) + " at an address " + std::to_string(address % alignment) +
           " bytes past a multiple of " + std::to_string(alignment),
       data->location, nullptr);
}

}  // extern "C"
