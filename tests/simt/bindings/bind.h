// SPDX-License-Identifier: Apache-2.0
// Makes cuda::run(Args) callable from Python: BIND((LstmStep<float>), gates, c, h, B, H) once for every instantiation,
// with all its fields in any order, then BINDINGS at the end of the file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/half.h"
#include "kernels/run.h"

namespace simt::bindings {

struct Entry {
  void (*run)(const void* args);
  std::string description;  // "name;size;field:offset:size:kind;..."
};

inline std::vector<Entry> entries;

// A field's kind: "const " for a pointer to what is only read, a '*' for a pointer, and the type of the element.
template <class T>
std::string kind() {
  if constexpr (std::is_pointer_v<T>) {
    using Element = std::remove_pointer_t<T>;
    return (std::is_const_v<Element> ? "const " : "") + kind<std::remove_const_t<Element>>() + "*";
  } else if constexpr (std::is_void_v<T>) {
    return "uint8";
  } else if constexpr (std::is_enum_v<T>) {
    return kind<std::underlying_type_t<T>>();
  } else if constexpr (std::is_same_v<T, bool>) {
    return "bool";
  } else if constexpr (std::is_same_v<T, llmkern::bfloat16>) {
    return "bfloat16";
  } else if constexpr (std::is_same_v<T, llmkern::float16>) {
    return "float16";
  } else if constexpr (std::is_floating_point_v<T>) {
    return "float" + std::to_string(8 * sizeof(T));
  } else if constexpr (std::is_integral_v<T>) {
    return (std::is_signed_v<T> ? "int" : "uint") + std::to_string(8 * sizeof(T));
  } else {
    return "struct" + std::to_string(sizeof(T));
  }
}

template <class T>
std::string field(const char* name, size_t offset) {
  return std::string(";") + name + ":" + std::to_string(offset) + ":" + std::to_string(sizeof(T)) + ":" + kind<T>();
}

template <class Args>
bool add(const char* name, const std::string& fields) {
  const auto run = [](const void* args) { llmkern::cuda::run(*static_cast<const Args*>(args), nullptr); };
  entries.push_back({run, std::string(name) + ";" + std::to_string(sizeof(Args)) + fields});
  return true;
}

// Null, or what was thrown.
inline const char* run(size_t i, const void* args) {
  static std::string error;
  try {
    entries[i].run(args);
    return nullptr;
  } catch (const std::exception& thrown) {
    error = thrown.what();
    return error.c_str();
  }
}

template <class T>
struct Unwrap;
template <class T>
struct Unwrap<void(T)> {  // the type inside parentheses, which keep its commas from the preprocessor
  using type = T;
};

}  // namespace simt::bindings

#define SIMT_PARENTHESES ()
#define SIMT_EXPAND(...) SIMT_EXPAND1(SIMT_EXPAND1(SIMT_EXPAND1(SIMT_EXPAND1(__VA_ARGS__))))
#define SIMT_EXPAND1(...) SIMT_EXPAND2(SIMT_EXPAND2(SIMT_EXPAND2(SIMT_EXPAND2(__VA_ARGS__))))
#define SIMT_EXPAND2(...) SIMT_EXPAND3(SIMT_EXPAND3(SIMT_EXPAND3(SIMT_EXPAND3(__VA_ARGS__))))
#define SIMT_EXPAND3(...) __VA_ARGS__
#define SIMT_FIELDS(first, ...)                                                \
  +simt::bindings::field<decltype(Args::first)>(#first, offsetof(Args, first)) \
      __VA_OPT__(SIMT_FIELDS_AGAIN SIMT_PARENTHESES(__VA_ARGS__))
#define SIMT_FIELDS_AGAIN() SIMT_FIELDS
#define SIMT_JOIN(a, b) SIMT_JOIN1(a, b)
#define SIMT_JOIN1(a, b) a##b

#define BIND(parenthesized, ...)                                                                           \
  static const bool SIMT_JOIN(simt_bound_, __COUNTER__) = [] {                                             \
    using Args = simt::bindings::Unwrap<void parenthesized>::type;                                         \
    return simt::bindings::add<Args>(#parenthesized, std::string() SIMT_EXPAND(SIMT_FIELDS(__VA_ARGS__))); \
  }();

// In the build that counts lines; elsewhere null.
extern "C" [[gnu::weak]] void __gcov_dump();

#define BINDINGS                                                                                       \
  extern "C" const char* simt_describe(size_t i) {                                                     \
    const auto& entries = simt::bindings::entries;                                                     \
    return i < entries.size() ? entries[i].description.c_str() : nullptr;                              \
  }                                                                                                    \
  extern "C" const char* simt_run(size_t i, const void* args) { return simt::bindings::run(i, args); } \
  extern "C" void simt_write_coverage() {                                                              \
    if (__gcov_dump != nullptr) __gcov_dump();                                                         \
  }

using namespace llmkern;
