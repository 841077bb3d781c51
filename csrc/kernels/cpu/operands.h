// SPDX-License-Identifier: Apache-2.0
// What products multiply, as against what memory holds.
//
// Memory holds elements of a storage type (float, double, bfloat16, float16). Tiles and panels (gemm.h) hold words as
// wide as a lane, made of elements when they are filled, and a multiply-add takes a vector of words from each side:
//
//   Wide<T>   a word is one element, widened: every type, on every instruction set
//   Bf16Pairs a word is two bfloat16, neighbours in k: an instruction of some AVX-512 machines multiplies both
//
// Sums are float32 (float64 for double). Where k is not a multiple of a word's terms the last word is filled with 0.
#pragma once

#include "kernels/cpu/storage.h"

namespace llmkern::cpu::LLMKERN_ISA {

template <class T>
struct Wide {
  using Storage = T;
  using Sum = Widened<T>;
  using Word = Sum;
  using Handed = Word;      // what workers hand one another: lstm/tiles.h
  using Projection = Wide;  // what multiplies by W_hr
  static constexpr int kTerms = 1;

  // The terms at `from`, of which `available` exist, one beside the other.
  static Word word(const T* from, int64_t) { return widen(*from); }
  // As many words as there are lanes, one beside the other.
  static Vec<Word> words(const T* from) { return load_wide(from); }
  // The words of a part of a vector at each of as many places as it has parts.
  static Vec<Word> parts(const T* from, int64_t stride) { return load_wide_parts(from, stride); }
  // `count` words whose first terms lie beside one another, as do their second ones, `stride` further on.
  static void line(const T* from, int64_t, int64_t, int64_t count, Word* to) { convert(to, from, count); }
  // Of vectors or halves of them.
  template <class V>
  static V multiply_add(V a, V b, V sum) {
    return fma(a, b, sum);
  }
};

#ifdef __AVX512F__
namespace {  // asked here, not of dispatch.cpp: builds share no function

inline bool has_bf16() { return __builtin_cpu_supports("avx512bf16"); }
inline bool has_vnni() { return __builtin_cpu_supports("avx512vnni"); }

}  // namespace

// The instruction is not among those that this build may use everywhere, because most machines with AVX-512 do not
// have it. One build more, of every kernel, for the sake of one instruction would leave the AVX-512 build itself
// without tests on machines that have it; so it is named to the assembler, here and nowhere else, behind has_bf16().
// What other machines do with bfloat16, Wide, is what every machine does with float16.
struct Bf16Pairs {
  using Storage = bfloat16;
  using Sum = float;
  using Word = int32_t;
  using Handed = Word;
  using Projection = Bf16Pairs;
  static constexpr int kTerms = 2;

  static Word word(const bfloat16* from, int64_t available) {
    const uint32_t second = available > 1 ? from[1].bits : 0;
    return static_cast<int32_t>(from[0].bits | second << 16);
  }
  static Vec<Word> words(const bfloat16* from) {
    IntVec v;
    memcpy(&v, from, sizeof v);
    return v;
  }
  static Vec<Word> parts(const bfloat16* from, int64_t stride) {
    return load_parts<Word>(from, stride * static_cast<int64_t>(sizeof *from));
  }
  static void line(const bfloat16* from, int64_t stride, int64_t available, int64_t count, Word* to) {
    for_lanes<float>(0, count, [&](int64_t i, int64_t n) {
      IntVec both = __builtin_convertvector(load_bits(from + i, n), IntVec);
      if (available > 1) both |= __builtin_convertvector(load_bits(from + stride + i, n), IntVec) << 16;
      store(to + i, both, n);
    });
  }
  template <class Pairs, class V>
  static V multiply_add(Pairs a, Pairs b, V sum) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
};
#endif

namespace {

// Calls f with what multiplies T here.
template <class T, class F>
void with_operand(const F& f) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<T, bfloat16>) {
    if (has_bf16()) return f(Bf16Pairs{});
  }
#endif
  f(Wide<T>{});
}

}  // namespace

template <class Op>
constexpr int64_t words_of(int64_t terms) {
  return (terms + Op::kTerms - 1) / Op::kTerms;
}

}  // namespace llmkern::cpu::LLMKERN_ISA
